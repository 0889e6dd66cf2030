"""The GPU report: what it would run is checked without a GPU, and its runner survives whatever a part does."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_report, smoke
from benchmarks.gpu_report import Part
from stn_fast.errors import UserError


def script(name, code, limit=30.0, shows="."):
    return Part(name, ("-c", code), limit, shows)


def now():
    return time.monotonic()


def reported(out, *parts):
    return gpu_report.report(parts, [], out, 120, now())


def runs(pid):
    """Whether the process still runs a second later; one that has ended may wait for the system to reap it."""
    for _ in range(10):
        try:
            if " Z " in Path("/proc", pid, "stat").read_text():
                return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


def test_every_selection_import_and_argument_holds(capsys):
    assert gpu_report.main(["--dry"]) == 0
    printed = capsys.readouterr().out
    assert "kernels" in printed
    assert "together" in printed


def test_a_part_that_takes_too_long_is_ended_with_its_children_and_the_next_runs(tmp_path, capsys):
    pid = tmp_path / "pid"
    forever = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "print('so far', flush=True)\ntime.sleep(60)\n"
    )
    start = time.monotonic()
    status = reported(tmp_path / "out", script("slow", forever, 10.0), script("next", "print('after')"))
    assert status == 1
    assert time.monotonic() - start < 30
    log = (tmp_path / "out" / "report.log").read_text()
    assert "slow: ended by force" in log
    assert "so far" in log
    assert "after" in log
    assert not runs(pid.read_text())
    assert "look at slow" in capsys.readouterr().out


def test_what_a_part_leaves_is_kept_even_where_another_breaks_off_while_it_writes(tmp_path):
    rows = [
        script("first", "open('{work}/first.rows.json', 'w').write('[{{\"op\": 1}}]')"),
        script("second", "open('{work}/second.rows.json', 'w').write('[{{\"op\"'); raise SystemExit(3)"),
        script("third", "open('{work}/third.rows.json', 'w').write('[{{\"op\": 3}}]')"),
    ]
    assert reported(tmp_path, *rows) == 1
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"op": 1}, {"op": 3}]
    assert "second: exit status 3" in (tmp_path / "report.log").read_text()


def test_no_part_begins_when_the_time_is_over_but_those_at_the_end(tmp_path, capsys):
    assert (
        gpu_report.report([script("late", "print('ran')")], [script("last", "print(5 * 5)")], tmp_path, 35, now()) == 1
    )
    printed = capsys.readouterr().out
    assert "late: left out: no time" in printed
    assert "    25\n" in printed


def test_an_empty_selection_and_a_wrong_argument_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing: its tests can't be collected"):
        gpu_report.dry_run([gpu_report.pytest_part("nothing", 10, "tests/kernels", "-k", "no_test_has_this_name")], 2)
    with pytest.raises(SystemExit):
        gpu_report.dry_run([gpu_report.benchmark_part("wrong", 10, "ratios", "--no-such-option")], 2)
    part = gpu_report.parts(1)[0]
    with pytest.raises(UserError, match="may take"):
        gpu_report.dry_run([replace(part, limit=gpu_report.BUDGET + 100)], 2)
    with pytest.raises(UserError, match="no part is named kernel; they are machine"):
        gpu_report.main(["--dry", "--parts", "kernel"])


def test_an_operation_that_no_case_has_is_told():
    with pytest.raises(UserError, match="no case's name starts with gated_lstn"):
        gpu_report.dry_run([gpu_report.ratios_part("typo", 10, "train", "gated_lstn")], 2)


def test_the_kernels_are_found_where_nothing_is_installed_and_links_are_lost(tmp_path):
    for folder in ("stn_fast", "kernels", "benchmarks/uninstalled"):
        shutil.copytree(gpu_report.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("kernels", "*.so"))
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "import stn_fast.kernels.tiles as tiles\nprint(tiles.__file__)\n"
    )
    folders = [str(tmp_path / "benchmarks/uninstalled"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "benchmarks", capture_output=True, text=True,
        env=gpu_report.environment(tmp_path, gpu_report.parts(1)[0]) | {"PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "kernels" / "tiles.py"), done.stderr


def test_a_recipe_that_does_not_train_is_counted(capsys):
    assert smoke.main(["digits", "--steps", "2", "--set", "schedule.batch_size=0"]) == 1
    assert smoke.main(["digits", "--steps", "6"]) == 0
    printed = capsys.readouterr().out
    assert "FAILED ConfigError" in printed
    assert "6 steps" in printed


def test_what_failed_is_told_of_tests_that_are_cut_short(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\nimport pytest\n"
        "@pytest.mark.parametrize('k', range(400))\n"
        "def test_it(k):\n    time.sleep(0.4)\n    assert k % 9, f'nine divides {k}'\n"
    )
    arguments = (*gpu_report.TESTS[:-2], "-n", "2", str(tmp_path))
    part = Part("tests", arguments, 24.0, "^FAILED")
    assert reported(tmp_path / "out", part) == 1
    log = (tmp_path / "out" / "report.log").read_text()
    assert "ended by force" in log
    assert "nine divides 0" in log


def test_the_page_of_aims_is_written(tmp_path):
    *_, last = gpu_report.closing()
    assert gpu_report.report([], [last], tmp_path, 60, now()) == 0
    assert (tmp_path / "summary.md").read_text().startswith("# Aims and figures")
