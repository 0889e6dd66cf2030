"""Runs whose batches two gloo processes share: the numbers of one process, resuming, signals, and errors."""

import os
import signal
import subprocess
import sys
import time

import gloo_differs
import gloo_runs
import pytest
import torch
import two_processes
from run_files import Warnings, result, rows

from stn_fast.errors import UserError
from stn_fast.training import checkpoint
from stn_fast.training.config import ConfigError
from stn_fast.training.disk import CannotWrite
from stn_fast.training.distributed import Processes, launched

PART = "text,schedule.max_steps=7"


def in_two(folder, *runs):
    two_processes.finish(two_processes.start([gloo_runs.__file__], folder, *runs))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with all of the runs by two processes, and the text's in two parts, and only the first of them."""
    root = tmp_path_factory.mktemp("shared")
    gloo_runs.write_texts(root)
    in_two(root, *(f"two:{name}" for name in gloo_runs.RUNS), f"parts:{PART}", "parts:text", f"part:{PART}")
    return root


def assert_close(one, other, place=""):
    """Equal but for the rounding of floating point numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=gloo_runs.ROUNDING, abs=1e-7), place
    else:
        assert one == other, place


@pytest.mark.parametrize("name", gloo_runs.RUNS)
def test_two_processes_compute_what_one_computes(name, shared):
    of_one = gloo_runs.run_in(shared / "one", name)
    one, two = (rows(shared / folder / name) for folder in ("one", "two"))
    assert len(one) > 2
    for found, expected in zip(two, one, strict=True):
        assert_close(found, expected)
    assert result(shared / "two" / name)["processes"] == 2
    assert of_one["processes"] == 1


def test_a_run_in_parts_is_that_in_one_bit_for_bit(shared):
    """It is interrupted in the middle of a pass over the text, where each process has the state of its own columns."""
    parts, whole = shared / "parts" / "text", shared / "two" / "text"
    assert result(parts) == result(whole)
    assert [row for row in rows(parts) if row["step"] != 7] == rows(whole)


def test_another_number_of_processes_goes_on_and_says_that_it_differs(shared):
    progress = Warnings()
    found = gloo_runs.run_in(shared / "part", "text", progress=progress)
    assert found["processes"] == 1
    (warning,) = progress.warnings
    assert "the checkpoint is of 2 processes and is continued by 1" in warning
    assert found["valid_loss"] == pytest.approx(result(shared / "two" / "text")["valid_loss"], rel=0.02)


DIES_ONCE = """
import os, signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stn_fast.recipes import digits

config = digits.config

def build(config):
    died = Path(__file__).with_name("died")

    @contextmanager
    def around_step(step):
        if step == 20 and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield

    return replace(digits.build(config), around_step=around_step)
"""


def test_torchrun_restarts_processes_of_which_one_has_died_and_the_run_is_the_same(tmp_path, shared):
    recipe = tmp_path / "dies_once.py"
    recipe.write_text(DIES_ONCE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["-m", "stn_fast.train", str(recipe), "--run-dir", str(tmp_path / "run")]
    command += [part for setting in (*gloo_runs.DIGITS, "schedule.checkpoint_epochs=1") for part in ("--set", setting)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    assert f"resuming {tmp_path / 'run'} after step 18" in done.stderr
    assert rows(tmp_path / "run") == rows(shared / "two" / "stn")
    assert result(tmp_path / "run") == result(shared / "two" / "stn")


def test_the_death_of_a_process_is_an_error_of_the_other_one_and_a_signal_stops_both_with_a_checkpoint(tmp_path):
    """The run then goes on bit for bit."""
    settings = (*gloo_runs.DIGITS, "schedule.epochs=400", "schedule.checkpoint_epochs=1")
    command = ["-m", "stn_fast.train", "digits", "--run-dir", str(tmp_path / "stn")]
    command += [part for setting in settings for part in ("--set", setting)]
    log = tmp_path / "stn" / "metrics.jsonl"

    def running_until(size):
        running = two_processes.start(command)
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size > size) and time.monotonic() < deadline:
            time.sleep(0.05)
        return running

    first, second = running_until(2000)
    second.kill()
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 1, said
    assert "error: another process has ended or does not answer" in said
    assert "Traceback" not in said
    running = running_until(log.stat().st_size + 4000)
    running[1].send_signal(signal.SIGTERM)
    first, second = two_processes.finish(running, 128 + signal.SIGTERM)
    assert "resuming" in first
    assert "stopped by SIGTERM after step" in first
    assert "with a checkpoint" in first
    assert second == ""
    stopped = max(checkpoint.steps(tmp_path / "stn" / "checkpoints"))
    ends = f"stn,schedule.epochs=400,schedule.checkpoint_epochs=1,schedule.max_steps={stopped + 10}"
    in_two(tmp_path, f".:{ends}", f"whole:{ends}")
    assert rows(tmp_path / "stn") == rows(tmp_path / "whole" / "stn")
    assert result(tmp_path / "stn") == result(tmp_path / "whole" / "stn")


def test_one_unit_in_the_last_place_of_one_process_is_an_error_of_both_and_in_no_checkpoint(tmp_path):
    said = two_processes.finish(two_processes.start([gloo_differs.__file__], tmp_path))
    assert said[0] == said[1]
    at_step, at_checkpoint, of_tuner = said[0].splitlines()
    differs = "the location of 'hidden_dropout_2'"
    assert at_step.startswith(f"after step 10, {differs}")
    assert at_checkpoint.startswith(f"after step 8, {differs}")
    for text, name in ((at_step, "step"), (at_checkpoint, "checkpoint")):
        assert "not bit for bit the same in all 2 processes" in text
        assert checkpoint.steps(tmp_path / name / "checkpoints") == [0]
    assert of_tuner.startswith("after step 10, 0.weight is not bit for bit the same")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["schedule.valid_batch_size=1"], r"valid_batch_size = 1: must be at least 2, the number of processes$"),
        (["schedule.valid_batch_size=5", "schedule.accumulation=3"], "= 5: must be at least 6, .* times 3 parts"),
    ],
)
def test_batches_that_are_too_small_to_share_are_an_error_before_the_first_step(tmp_path, two, settings, says):
    with pytest.raises(UserError, match=says):
        gloo_runs.run_in(tmp_path, "stn", *settings, processes=Processes(two))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_an_environment_of_several_processes_without_ranks_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set, but RANK, LOCAL_RANK"), launched("cpu"):
        pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("device", "cuda", "needs one"), UserError),
        (CannotWrite("disk"), CannotWrite),
        (KeyError("x"), RuntimeError),
    ],
)
def test_an_error_of_the_first_process_is_one_of_all(two, monkeypatch, error, kind):
    def fail():
        raise error

    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda told, **_: sent.extend(told))
    first, second = Processes(two), Processes(two)
    second.rank = 1
    with pytest.raises(type(error)) as raised:
        first.first(fail)
    assert raised.value is error
    (told,) = sent
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda into, **_: into.__setitem__(0, told))
    with pytest.raises(kind) as raised:
        second.first(fail)
    assert type(raised.value) is kind
    assert str(raised.value) == str(error)


@pytest.mark.parametrize("examples", [1, 2, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_a_batch_once_and_differ_by_one(examples, size):
    processes = [object.__new__(Processes) for _ in range(size)]
    for rank, one in enumerate(processes):
        one.rank, one.size = rank, size
    shares = [one.share(examples) for one in processes]
    covered = [example for share in shares for example in range(examples)[share]]
    assert covered == [*range(examples)]
    counts = [share.stop - share.start for share in shares]
    assert max(counts) - min(counts) <= 1
