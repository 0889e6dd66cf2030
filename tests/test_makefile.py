"""The Makefile works wherever the clone is, whatever the names of the folders above it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["Ann's work", 'the "new" one', "a $HOME b$(x)", "no#1 100%", "läuft σ", "a;b&c", "`echo x`\\n"]
TARGETS = {
    "help",
    "venv",
    "train",
    "lint",
    "test",
    "check",
    "launched-kernels",
    "count-compilations",
    "compile-ahead",
    "cases",
    "bench",
    "test-faults",
    "test-gpu",
    "bench-gpu",
    "gpu-report",
    "clean",
}


def clone(folder):
    """A folder with what the Makefile reads."""
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder, *arguments):
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_the_environment_finds_a_clone_in_any_folder(tmp_path, name):
    folder = clone(tmp_path / name / "clone")
    line = next(line for line in make(folder, "-n", "venv").splitlines() if ".pth" in line)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    done = subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "stn_fast").mkdir()
    (folder / "stn_fast" / "__init__.py").touch()
    found = subprocess.run(
        [folder / ".venv" / "bin" / "python", "-c", "import stn_fast; print(ascii(stn_fast.__file__))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == ascii(str(folder / "stn_fast" / "__init__.py")), found.stderr


@pytest.mark.parametrize("name", FOLDERS)
def test_no_recipe_contains_the_path_of_the_clone(tmp_path, name):
    folder = clone(tmp_path / name / "clone")
    assert not [target for target in sorted(TARGETS) if str(tmp_path) in make(folder, "-n", target)]


def test_help_lists_every_target_that_a_user_calls():
    listed = {line.split()[0] for line in make(ROOT, "help").splitlines()}
    assert listed == TARGETS
