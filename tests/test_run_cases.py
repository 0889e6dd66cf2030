"""make cases: every script runs, from the root of the repository, and one that fails is counted."""

import subprocess
import sys
from pathlib import Path

import pytest
import run_cases

ROOT = Path(__file__).resolve().parent.parent
GOOD = f"import os, stn_fast, sys; sys.exit(os.getcwd() != {str(ROOT)!r})"


@pytest.fixture
def cases(tmp_path):
    """A folder with a name that shells trip over, and three scripts that pass."""
    folder = tmp_path / 'Ann\'s $HOME "cases"'
    folder.mkdir()
    for name in ("01_one", "02_two", "_helper_that_would_fail", "03_three"):
        (folder / f"{name}.py").write_text("raise SystemExit(1)" if name[0] == "_" else GOOD)
    (folder / "README.md").touch()
    return folder


def test_scripts_that_pass_are_listed_and_counted(cases, capsys):
    assert run_cases.main([str(cases)]) == 0
    *lines, count = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["01_one.py", "02_two.py", "03_three.py"]
    assert all(line.startswith("exit status       0 ") for line in lines)
    assert count == "0 of 3 failed"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(1)", "1"),
        ("1 / 0", "1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "-11"),
        ("import time; time.sleep(60)", "timeout"),
        ("this is not Python", "1"),
    ],
)
def test_a_script_that_fails_in_any_way_is_counted_and_the_others_run(cases, code, status, capsys):
    (cases / "01_one.py").write_text(code)
    assert run_cases.main([str(cases)], timeout=10) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2] == status
    assert [line.split()[2] for line in lines[1:3]] == ["0", "0"]
    assert lines[3] == "1 of 3 failed"


@pytest.mark.parametrize("arguments", [[], [""], ["absent"], ["a", "b"]])
def test_a_folder_without_scripts_is_a_failure(arguments, capsys):
    assert run_cases.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_make_passes_the_folder_on_as_it_is(cases):
    make = ["make", "--no-print-directory", "-o", ".venv/.installed", f"RUN={sys.executable}", "cases"]
    folder = str(cases).replace("$", "$$")
    done = subprocess.run([*make, f"CASES={folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("0 of 3 failed\n")
    (cases / "02_two.py").write_text("raise SystemExit(3)")
    assert subprocess.run([*make, f"CASES={folder}"], cwd=ROOT, capture_output=True).returncode == 2
