"""Commands and Python of the README and docs/results.md run, or take their arguments; files they point to exist."""

import os
import re
import runpy
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import libraries
import pytest

from benchmarks.gpu_report import parse_only
from stn_fast import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)


# Modules whose tests have another name than theirs.
TESTED_WITH = {"steps": "whole_steps", "language_steps": "whole_steps"}
COMMANDS = tuple(
    f"python -m {name}"
    for name in ("benchmarks.", "stn_fast.compare ", "stn_fast.contact_sheet ", "stn_fast.explore ", "stn_fast.plot ")
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    """The lines of the shell blocks, without their comments, and the commands named in the text."""
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = re.findall(r"`((?:make|python|pip) [^`]+)`", prose)
    return list(dict.fromkeys(line for line in [*lines, *named] if line))


def test_the_readme_has_commands_and_python() -> None:
    assert {"make train", "make test"} <= set(commands())
    assert blocks("python")


def starting(*beginnings: str) -> list[str]:
    return [command for command in commands() if command.startswith(beginnings)]


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    kinds = ("make ", "pip ", "python -m stn_fast.train ", *COMMANDS)
    assert set(starting(*kinds)) == set(commands())


@pytest.mark.parametrize("command", starting("make "))
def test_target_exists(command: str) -> None:
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    planned = subprocess.run([*command.split(), "-n"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("command", starting(*COMMANDS))
def test_command_takes_its_arguments(command: str) -> None:
    """Up to where it has parsed them; every module has tests of its own that run it."""
    _, _, module, *arguments = command.split()
    folder, name = {"stn_fast": ".", "benchmarks": "benchmarks"}[module.split(".")[0]], module.split(".")[1]
    assert (ROOT / "tests" / folder / f"test_{TESTED_WITH.get(name, name)}.py").exists()
    if "--help" in arguments:
        return  # test_module_runs_by_its_name
    parse_only(module, arguments)


@pytest.mark.parametrize("command", [line for line in starting("python -m stn_fast.train ") if "--help" not in line])
def test_training_command_takes_its_arguments(command: str, capsys: pytest.CaptureFixture) -> None:
    """Up to its configuration; the tests in tests/recipes run every recipe."""
    recipe, *flags = command.split()[3:]
    assert train.main([recipe, *flags, "--print-config"]) == 0
    assert f"recipe: {recipe}\n" in capsys.readouterr().out


@pytest.mark.parametrize("module", sorted({line.split()[2] for line in starting("python -m ")}))
def test_module_runs_by_its_name(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of a module that has been imported
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code
    assert f"python -m {module}" in capsys.readouterr().out


def shortened(code: str) -> str:
    """The code with an eighth of its epochs and steps."""
    return re.sub(r"(epochs=|\brange\((?:0, )?)(\d{2,})", lambda found: f"{found[1]}{int(found[2]) // 8}", code)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_from_any_folder(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if with_timm := "import timm" in code:
        if find_spec("timm") is None:
            pytest.skip("timm is not installed")
        libraries.make_torchvision_importable()
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(shortened(code), "README.md", "exec"), {"__name__": "__main__"})
    assert ("drop_path" if with_timm else "dropout") in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_points_to_exists(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not target.startswith("http")]
    assert targets
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
