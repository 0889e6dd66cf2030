"""Every command and line of Python in the README and in docs/results.md runs, and every file they point to exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)


DATA = {"fashion-mnist": "fashion_mnist", "cifar10": "cifar10", "ptb": "ptb"}  # by the beginning of a recipe's name


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


@pytest.mark.parametrize("command", commands())
def test_command_runs(command: str, tmp_path: Path) -> None:
    """make: the target exists (`make -n`). Training and evidence run an epoch on few examples, timings once."""
    if command.startswith("make "):
        alone = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES", "ARGS")
        }
        planned = subprocess.run(
            [*command.split(), "-n"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60
        )
        assert planned.returncode == 0, planned.stderr
        if command != "make train":
            return
        (line,) = [line for line in planned.stdout.splitlines() if "stn_fast.train" in line]
        command = line.partition("python ")[1] + line.partition("python ")[2]
        command += f" --epochs 1 --run-dir {tmp_path / 'run'}"
    if any(name in command for name in ("self_tuning", "benchmarks.precision", "response_rank")):
        command += " --epochs 1 --seeds 1"
    if "benchmarks.precision" in command:
        command = command.replace("digits fashion-mnist-small", "digits").replace("ptb-small", "digits")
    if "response_rank" in command:
        command += " --variants full rank-1"
    if "stn_fast.compare" in command:
        command += f" --epochs 1 --seeds 1 --budget 1 --methods fixed --guesses low --out {tmp_path / 'out'}"
    elif "--guesses" in command:
        command += " --methods stn --guesses .05"
    if "response_step" in command:
        command += " --networks mlp --modes response --rounds 1 --seconds 0.1"
    if "benchmarks.steps" in command:
        command += " --batch 8 --modes cycle --rounds 1 --seconds 0.1"
    if command.startswith("pip "):
        pytest.skip("tests/test_packaging.py builds and installs the package")
    folder = next((data for name, data in DATA.items() if f" {name}" in command), None)
    if command.startswith("python -m stn_fast.train ptb --device"):
        folder = None
        command = command.replace("--device cuda", "--print-config")  # its test text alone is minutes on a CPU
    elif folder:
        needed = Path(folder)
        if not (Path(os.environ.get("STN_FAST_DATA", "missing")) / needed).exists():
            pytest.skip(f"STN_FAST_DATA names no folder that holds {needed}")
        if "stn_fast.train" in command:
            command = command.replace("--device cuda", "") + f" --max-steps 2 --run-dir {tmp_path / 'run'}"
        if "contact_sheet" in command:
            command += f" -o {tmp_path / 'sheet.png'}"
    if "benchmarks.language_steps" in command:
        command += " --sizes ptb-small --modes cycle --rounds 1 --seconds 0.1"
    program, *arguments = command.split()
    assert program == "python"
    if folder and "contact_sheet" not in command:
        assert arguments[0] == "-m"
        arguments[0] = str(ROOT / "tests" / "few_examples.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    if "stn_fast.train" in command and "--help" not in command and "--print-config" not in command:
        assert (tmp_path / "run" / "result.json").exists()
    if "stn_fast.compare" in command and "--help" not in command:
        assert (tmp_path / "out" / "compare.png").exists()


@pytest.mark.parametrize("module", sorted({line.split()[2] for line in commands() if line.startswith("python -m")}))
def test_module_runs_by_its_name(module: str) -> None:
    subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_from_any_folder(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "dropout" in result.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_points_to_exists(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", page.read_text()) if not target.startswith("http")]
    assert targets
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
