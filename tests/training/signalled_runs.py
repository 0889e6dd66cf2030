"""Runs of two processes of which one gets a signal, for test_rank_signals.py here and in tests/faults."""

import re
import time

import gloo_signals
import two_processes
from run_files import result, rows

SECONDS = 30  # from a signal to the end of both processes; a step takes milliseconds, and so does a checkpoint


def launch(folder, phase="none", name="SIGTERM", status=0):
    running = two_processes.start([gloo_signals.__file__], folder, phase, name)
    return two_processes.finish(running, status, timeout=400)


def check_signal(folder, phase, name, whole):
    """Both processes end with status 143 after a checkpoint, soon, and the same command continues bit for bit."""
    first, second = launch(folder, phase, name, 143)
    assert time.time() - float((folder / "signalled").read_text()) < SECONDS
    stopped = re.search(rf"stopped by {name} after step (\d+), with a checkpoint", first)
    assert stopped, first
    assert second == ""
    first, _ = launch(folder, phase, name)
    assert f"resuming {folder / 'run'} after step {stopped[1]}" in first
    assert rows(folder / "run") == rows(whole)
    assert result(folder / "run") == result(whole)
    return int(stopped[1])
