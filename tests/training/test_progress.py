"""What a run says while it runs: where there is no terminal a line now and then, however long an epoch takes."""

import os
import signal
import sys

import pytest

from stn_fast.training import progress
from stn_fast.training.progress import Progress
from stn_fast.training.signals import StopRequest


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def evaluation(epoch):
    return {"phase": "eval", "loss": 1.0, "epoch": epoch, "step": 10 * epoch, "wall_seconds": 1.0}


def test_a_long_epoch_is_not_silent(clock, capsys):
    with Progress(epochs=200) as it:
        for step in range(1, 200):
            clock[0] += 1.0
            it.step(step / 100)
    said = capsys.readouterr().err.splitlines()
    assert [line.split() for line in said] == [["epoch", f"{part:.2f}/200"] for part in (0.6, 1.2, 1.8)]


def test_a_row_is_shown_after_a_long_silence(clock, capsys):
    it = Progress(epochs=200)
    it.row(evaluation(1))
    assert capsys.readouterr().err == ""
    clock[0] += 60
    it.row(evaluation(2))
    it.row(evaluation(3))
    assert capsys.readouterr().err.startswith("epoch    2/200  step     20")


def test_quiet_says_nothing(clock, capsys):
    with Progress(epochs=200, quiet=True) as it:
        clock[0] += 1000
        it.step(0.5)
        it.row(evaluation(1))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_bar_moves_within_an_epoch(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(epochs=2) as it:
        clock[0] += 1
        it.step(0.25)
        it.step(0.26)  # too soon to be drawn
        clock[0] += 1
        it.step(1.5)
    said = capsys.readouterr().err
    assert "epoch 0.25/2" in said
    assert "epoch 0.26/2" not in said
    assert "epoch 1.50/2" in said


def test_the_bar_of_a_resumed_run_only_counts_its_own_time(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    it = Progress(epochs=4)
    it.start = 3.0
    with it:
        assert it._bar.initial == 3.0
    assert "epoch 3.00/4" in capsys.readouterr().err


def test_ctrl_c_says_that_the_step_is_finished_first(monkeypatch):
    written = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(os, "write", lambda file, text: written.append((file, text)))
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGINT
    ((file, text),) = written
    assert file == 2
    assert b"Ctrl-C again stops at once" in text
