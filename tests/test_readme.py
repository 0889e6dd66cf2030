"""Commands and Python of the pages run, or take their arguments; files that the pages point to exist."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from benchmarks.gpu_report import parse_only
from stn_fast import train
from stn_fast.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "runs.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)


# Modules whose tests have another name than theirs.
TESTED_WITH = {"steps": "whole_steps", "language_steps": "whole_steps"}
# What commands call when they have checked their arguments.
ASKS = {
    "stn_fast.compare": "stn_fast.comparison.command.compare",
    "benchmarks.self_tuning": "benchmarks.self_tuning.compare",
}
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
    kinds = ("make ", "pip ", "torchrun ", "python -m stn_fast.train ", *COMMANDS)
    assert set(starting(*kinds)) == set(commands())


@pytest.mark.parametrize("command", starting("make "))
def test_target_exists(command: str) -> None:
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")}
    planned = subprocess.run([*command.split(), "-n"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr


class Asked(Exception):
    """The command has checked its arguments, and asks for runs."""


@pytest.mark.parametrize("command", starting(*COMMANDS))
def test_command_takes_its_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to where it asks for runs, or has parsed them; every module has tests of its own that run it."""
    _, _, module, *arguments = command.split()
    folder, name = {"stn_fast": ".", "benchmarks": "benchmarks"}[module.split(".")[0]], module.split(".")[1]
    assert (ROOT / "tests" / folder / f"test_{TESTED_WITH.get(name, name)}.py").exists()
    if "--help" in arguments:
        return  # test_module_runs_by_its_name
    if module in ASKS:

        def asked(*_: object, **__: object) -> None:
            raise Asked

        monkeypatch.setattr(ASKS[module], asked)
        with pytest.raises(Asked):
            importlib.import_module(module).main(arguments)
        return
    assert module != "stn_fast.contact_sheet" or arguments[0] in RECIPES
    parse_only(module, arguments)


@pytest.mark.parametrize("command", [line for line in starting("python -m stn_fast.train ") if "--help" not in line])
def test_training_command_takes_its_arguments(command: str, capsys: pytest.CaptureFixture) -> None:
    """Up to its configuration; the tests in tests/recipes run every recipe."""
    recipe, *flags = command.split()[3:]
    assert train.main([recipe, *flags, "--print-config"]) == 0
    assert f"recipe: {recipe}\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", starting("torchrun "))
def test_torchrun_launches_a_training_command(command: str, capsys: pytest.CaptureFixture) -> None:
    """tests/training/test_shared_runs.py runs recipes in processes that are launched as torchrun does."""
    launched = get_args_parser().parse_args(command.split()[1:])
    assert (launched.module, launched.training_script) == (True, "stn_fast.train")
    recipe, *flags = launched.training_script_args
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


def test_python_runs_from_any_folder(tmp_path: Path) -> None:
    """Each block by itself, one after another in one process."""
    codes = [code for code in blocks("python") if find_spec("timm") or "import timm" not in code]
    lines = ["import sys"]
    for code in codes:
        if "import timm" in code:
            lines += [f"sys.path.append({str(ROOT / 'tests')!r})", "import libraries"]
            lines += ["libraries.make_torchvision_importable()"]
        lines += [f"exec(compile({shortened(code)!r}, 'README.md', 'exec'), {{'__name__': '__main__'}})"]
        lines += ["print('=== end of a block')"]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.split("=== end of a block\n")[:-1]
    assert len(said) == len(codes)
    assert all("drop" in one for one in said), "a block didn't print its dropout rates"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_points_to_exists(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not target.startswith("http")]
    assert targets
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
