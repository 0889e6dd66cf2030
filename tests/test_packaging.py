"""What is shipped works elsewhere: an sdist, the wheel built from it in isolation, and the package in that wheel."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")
OFFLINE = re.compile(
    r"Temporary failure in name resolution|NewConnectionError|No matching distribution found for setup"
)


class Built(NamedTuple):
    """Where the artefacts are, and what the compiler was called with."""

    sdist: Path
    wheel: Path
    site: Path
    log: str


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed, free of the flags and paths that this process was given."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "PYTHONPATH")}
    result = subprocess.run(
        command,
        cwd=cwd,
        env=kept | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    if result.returncode and OFFLINE.search(result.stdout):
        pytest.skip("an isolated build fetches setuptools and pybind11, and no package index answers here")
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The sdist of a clean copy, the wheel of that sdist, and the wheel installed away from the checkout."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        shutil.copy(ROOT / name, source)
    for name in ("stn_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "no_device.json").write_text("{}")
    dist = folder / "dist"
    dist.mkdir()
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(dist)!r})"
    run(sys.executable, "-c", hook, cwd=source)
    (sdist,) = dist.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    log = run(*pip, "wheel", "-v", "--no-deps", "-w", str(dist), str(sdist), cwd=folder)
    (wheel,) = dist.glob("*.whl")
    site = folder / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=folder)
    yield Built(sdist, wheel, site, log)
    shutil.rmtree(folder)


def elsewhere(built: Built, code: str) -> str:
    """Run code with the installed wheel, where neither this folder nor this checkout can be imported by accident."""
    guard = (
        f"import sys; sys.path.insert(0, {str(built.site)!r})\n"
        "import stn_fast, stn_fast._C, stn_fast.kernels\n"
        "for module in (stn_fast, stn_fast._C, stn_fast.kernels):\n"
        f"    assert module.__file__.startswith({str(built.site)!r}), module.__file__\n"
    )
    return run(sys.executable, "-I", "-c", guard + code, cwd=built.site.parent)


def test_the_sdist_holds_all_that_a_build_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        str(path.relative_to(ROOT))
        for pattern in ("csrc/*", "kernels/*.py", "kernels/cuda/*", "stn_fast/**/*.py*")
        for path in ROOT.glob(pattern)
    }
    needed = {name for name in needed if "__pycache__" not in name}
    assert needed | set(SHIPPED) - {"MANIFEST.in"} <= names


def test_the_wheel_holds_the_core_the_kernels_and_the_types(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    assert any(re.fullmatch(r"stn_fast/_C\..*(so|pyd)", name) for name in names)
    kernels = {path.relative_to(ROOT) for pattern in ("*.py", "cuda/*") for path in (ROOT / "kernels").glob(pattern)}
    assert {f"stn_fast/{path}" for path in kernels} <= names
    assert {"stn_fast/py.typed", "stn_fast/_C.pyi", "stn_fast/kernels/tuned/no_device.json"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "stn_fast").rglob("*.py")} <= names
    strangers = {name.split("/")[0] for name in names if not re.match(r"stn_fast(/|-)", name)}
    assert not strangers, "the wheel would install other top-level names"


def test_the_installed_wheel_computes_on_its_core(built: Built) -> None:
    printed = elsewhere(
        built,
        "import torch\n"
        "from stn_fast.dispatch import choose\n"
        "assert choose(torch.device('cpu')) == 'cpp'\n"
        "x, rate = torch.ones(4, 1000), torch.tensor([0.0, 0.25, 0.5, 1.0])\n"
        "y = stn_fast.functional.dropout(x, rate, seed=0, step=0, stream=1)\n"
        "assert (y[0] == 1).all() and (y[3] == 0).all() and abs(y[1:3].mean().item() - 1) < 0.1\n"
        "layer = stn_fast.HyperLinear(8, 4, num_hyperparameters=2)\n"
        "layer(torch.ones(3, 8), torch.zeros(3, 2)).sum().backward()\n"
        "torch.testing.assert_close(layer.weight.grad, torch.full((4, 8), 3.0))\n"
        "print(stn_fast.backends())\n",
    )
    assert "cpp        available" in printed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is installed on Linux alone")
def test_every_kernel_module_of_the_wheel_imports(built: Built) -> None:
    elsewhere(
        built,
        "import importlib, pkgutil\n"
        "names = [module.name for module in pkgutil.iter_modules(stn_fast.kernels.__path__)]\n"
        "assert names\n"
        "for name in names: importlib.import_module('stn_fast.kernels.' + name)\n",
    )


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf comes with binutils")
def test_the_core_is_linked_to_no_torch_library(built: Built) -> None:
    (core,) = (built.site / "stn_fast").glob("_C*.so")
    dynamic = run("readelf", "-d", str(core), cwd=built.site)
    libraries = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert libraries
    assert not [name for name in libraries if re.search("torch|c10|cuda", name)], libraries


def test_the_core_is_compiled_for_every_processor_of_its_kind(built: Built) -> None:
    """No flag that allows instructions beyond the baseline: those are chosen when the core is loaded."""
    compilations = [line for line in built.log.splitlines() if re.search(r"\s-c csrc/\w+\.cpp", line)]
    assert len(compilations) >= len(list((ROOT / "csrc").glob("*.cpp")))
    for line in compilations:
        assert not re.search(r"\s-(march|mcpu|mtune=native|mavx\S*|mfma|msse\S*|ffast-math|Ofast)\b", line), line
        assert "-std=c++17" in line


def test_a_build_needs_setuptools_and_pybind11_alone() -> None:
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert requires
    assert sorted(re.findall(r'"([a-z0-9]+)', requires[1])) == ["pybind11", "setuptools"]


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_a_folder_with_the_packages_name_does_not_hide_it(tmp_path: Path) -> None:
    """As the parent folder of a clone has one: without __init__.py it passes for a namespace package."""
    (tmp_path / "stn_fast").mkdir()
    code = "import stn_fast; print(stn_fast.__version__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
