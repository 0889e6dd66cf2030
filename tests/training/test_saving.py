"""Checkpoints written beside the steps: a consistent copy, one at a time, and no error or thread is lost."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from kills import leaves
from run_files import Warnings, rows

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.disk import CannotWrite
from stn_fast.training.run import run
from stn_fast.training.saving import Saving
from stn_fast.training.step_clock import StepClock
from stn_fast.training.trainer import Diverged, Trainer

WAITS = 60  # seconds, at most, for what another thread does


class Slow:
    """`checkpoint.write_encoded` that waits until ``go`` is set; ``began`` is set when it is called."""

    def __init__(self, monkeypatch, fails=False):
        self.began, self.go, self.running, self.most, self.fails = threading.Event(), threading.Event(), 0, 0, fails
        self._write = checkpoint.write_encoded
        monkeypatch.setattr(checkpoint, "write_encoded", self)

    def __call__(self, root, step, *given):
        self.running += 1
        self.most = max(self.most, self.running)
        self.began.set()
        assert self.go.wait(WAITS)
        self.running -= 1
        if self.fails and step:
            raise CannotWrite(f"step {step}")
        return self._write(root, step, *given)


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_steps_go_on_beside_a_write_and_it_has_the_state_from_before_them(make_config, monkeypatch, train, tmp_path):
    slow, advance, beside = Slow(monkeypatch), Trainer._advance, []

    def note(trainer):
        beside.append(bool(writers()))
        advance(trainer)
        if trainer.step == 9:  # the first epoch's last; then comes a save, which waits for the one of step 0
            assert slow.running == 1
            slow.go.set()

    monkeypatch.setattr(Trainer, "_advance", note)
    directory = train("schedule.max_steps=20", "schedule.checkpoints_kept=9")
    assert beside[:9] == [True] * 9
    assert slow.most == 1
    assert not writers()
    monkeypatch.undo()
    other = train("schedule.max_steps=9", name="other")
    one, same = (checkpoint.read(checkpoint.path_of(root / "checkpoints", 9)) for root in (directory, other))
    for name, weight in one["method"]["model"].items():
        assert torch.equal(weight, same["method"]["model"][name])
    assert one["method"]["optimizer"]["state"][0]["momentum_buffer"].equal(
        same["method"]["optimizer"]["state"][0]["momentum_buffer"]
    )


def test_a_copy_is_not_changed_by_what_happens_after_it():
    saving, tensor, go, seen = Saving(), torch.zeros(3), threading.Event(), []

    def write(text, tensors):
        assert go.wait(WAITS)
        seen.append((text, tensors["weights"].clone()))

    state = {"weights": tensor, "step": 1}
    for step in (1, 2):  # the second copy is in the memory of the first
        tensor.fill_(step)
        state["step"] = step
        saving.begin(state, write)
        tensor.fill_(9)
        state["step"] = 9
        go.set()
        saving.wait()
        go.clear()
    assert [copy.tolist() for _, copy in seen] == [[1, 1, 1], [2, 2, 2]]
    assert [text for text, _ in seen] == [b'{"weights": {"$tensor": "weights"}, "step": %d}' % step for step in (1, 2)]


def test_an_error_of_a_write_is_raised_at_the_next_step_and_the_checkpoint_before_is_intact(train, monkeypatch, whole):
    slow, advance, last = Slow(monkeypatch, fails=True), Trainer._advance, []
    slow.go.set()

    def note(trainer):
        last.append(trainer.step)
        advance(trainer)
        if trainer.step == 12:
            trainer._saving.settle()

    monkeypatch.setattr(Trainer, "_advance", note)
    with pytest.raises(CannotWrite, match=r"^step 9$"):
        train("schedule.checkpoint_epochs=1")
    assert 8 <= last[-1] <= 11  # at 9 it began; it is known at 12 at the latest, long before the next one, at 18
    assert not writers()
    monkeypatch.undo()
    directory = train("schedule.checkpoint_epochs=2")
    assert rows(directory) == rows(whole)


def test_an_error_that_no_step_follows_is_raised_at_the_end(train, monkeypatch):
    Slow(monkeypatch, fails=True).go.set()
    with pytest.raises(CannotWrite, match=r"^step 5$"):
        train("schedule.max_steps=5")


def test_divergence_waits_for_the_checkpoint_that_its_message_names(make_config, monkeypatch):
    slow, diverge = Slow(monkeypatch), Trainer._diverge

    def diverge_while_it_is_written(trainer, what):
        threading.Timer(0.3, slow.go.set).start()
        diverge(trainer, what)

    monkeypatch.setattr(Trainer, "_diverge", diverge_while_it_is_written)
    hot = make_config("optimizer.learning_rate=1e6", "optimizer.momentum=0", "optimizer.clip=null")
    with pytest.raises(Diverged, match=r"The last good checkpoint is .*step-00000000"):
        run(hot, digits.build)
    assert not writers()


def test_another_error_does_not_hide_that_a_checkpoint_could_not_be_written(make_config, monkeypatch):
    Slow(monkeypatch, fails=True).go.set()
    advance, progress = Trainer._advance, Warnings()

    def fail(trainer):
        advance(trainer)
        if trainer.step == 10:
            trainer._saving.settle()
            raise KeyError("mine")

    monkeypatch.setattr(Saving, "failed", False)
    monkeypatch.setattr(Trainer, "_advance", fail)
    with pytest.raises(KeyError, match="mine"):
        run(make_config("schedule.checkpoint_epochs=1"), digits.build, progress=progress)
    assert progress.warnings == ["step 9"]
    assert not writers()


def test_what_a_checkpoint_can_not_hold_is_an_error_of_the_save_itself():
    with pytest.raises(UserError, match=r"can't hold here, a builtins\.object"):
        Saving().begin({"here": object()}, lambda text, tensors: pytest.fail("written"))


def test_the_next_write_raises_the_error_of_the_one_before():
    saving = Saving()
    saving.begin({}, lambda text, tensors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saving.begin({}, lambda text, tensors: None)
    saving.begin({}, lambda text, tensors: None)
    saving.wait()
    assert not saving.failed


def test_the_cpu_time_of_a_write_is_not_that_of_steps():
    def burn(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    saving = Saving()
    clock = StepClock(beside=lambda: saving.cpu_seconds)
    clock.resume()
    saving.begin({}, lambda text, tensors: burn(0.3))
    if hasattr(time, "pthread_getcpuclockid"):  # while it runs, too
        deadline = time.monotonic() + WAITS
        while saving.cpu_seconds < 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 0.1 <= saving.cpu_seconds < 0.3
        clock.pause()
        clock.resume()
        assert clock.cpu_seconds < 0.1
    saving.wait()
    burn(0.1)
    clock.pause()
    assert 0.1 <= clock.cpu_seconds < 0.3 <= saving.cpu_seconds


def test_saving_more_often_changes_no_number(train, whole):
    assert rows(train("schedule.checkpoint_epochs=1", "schedule.checkpoints_kept=5")) == rows(whole)


def test_training_does_not_depend_on_evaluations(train, whole, monkeypatch):
    """Without them, all that the method has learnt is the same, bit for bit."""
    monkeypatch.setattr(Trainer, "all_scores", lambda trainer: {"valid_loss": 1.0 / (1 + trainer.step)})
    directory = train()
    last = checkpoint.path_of(directory / "checkpoints", 72)
    kept, expected = (
        checkpoint.read(whole.parent / path)["method"] for path in (last, "whole/checkpoints/step-00000072")
    )
    assert dict(leaves(kept, "")) == dict(leaves(expected, ""))
    trained, others = ([row for row in rows(each) if row["phase"] == "train"] for each in (directory, whole))
    assert trained == others != []


CTRL_C = """
import os, signal, sys, threading, time
from stn_fast import train
from stn_fast.training import checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)  # this may run in the background
write, times, signalled = checkpoint.write_encoded, int(sys.argv.pop(1)), []

def interrupt():
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

def slow(root, step, *given):
    if step and not signalled:
        signalled.append(step)
        threading.Thread(target=interrupt).start()
        time.sleep(1.0)
    return write(root, step, *given)

checkpoint.write_encoded = slow
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_a_checkpoint_is_written_ends_the_run_and_leaves_it_whole(tmp_path, times):
    """Once: after another one of the last step. Twice: after the one that is being written."""
    command = [sys.executable, "-c", CTRL_C, str(times), "digits", "--run-dir", str(tmp_path / "run")]
    command += ["--epochs", "400", "--set", "schedule.checkpoint_epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints", "cpu", pytest.fail) is not None
    if times == 1:
        assert done.returncode == 128 + signal.SIGINT, done.stderr
        assert f"stopped by SIGINT after step {found[-1]}, with a checkpoint" in done.stderr
    else:
        assert done.returncode in (130, -signal.SIGINT), done.stderr
        assert "with a checkpoint" not in done.stderr
        assert found[-1] == 9
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
