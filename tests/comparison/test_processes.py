"""Processes: results in order, and what happens if a call fails, dies or is stopped."""

import math
import os
import signal
import threading
import time

import pytest

from stn_fast.comparison.processes import Processes, Stopped
from stn_fast.errors import UserError
from stn_fast.recipes import recipe


def test_results_are_in_order():
    with Processes(2) as processes:
        assert list(processes.map(math.factorial, [5, 3, 4])) == [120, 6, 24]


def test_a_task_has_the_results_of_its_calls_and_runs_beside_another():
    found = []

    def chain(number):
        for _ in range(2):
            number = yield math.factorial, (number,)
        found.append(number)

    with Processes(2) as processes:
        processes.run([chain(3), chain(2)])
    assert sorted(found) == [2, 720]


@pytest.mark.parametrize(
    ("function", "argument", "error", "says"),
    [
        (recipe, "nothing", UserError, "unknown recipe 'nothing'"),
        (os.listdir, os.devnull, UserError, "Not a directory"),
        (os._exit, 3, RuntimeError, "ended with status 3"),
        (math.factorial, -1, RuntimeError, "ended with status 1"),
    ],
)
def test_a_call_that_fails_is_an_error(function, argument, error, says):
    with Processes(2) as processes, pytest.raises(error, match=says):
        list(processes.map(function, [argument]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(number):
    timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
    began, processes = time.monotonic(), Processes(2)
    timer.start()
    with pytest.raises(Stopped) as stop, processes:
        list(processes.map(time.sleep, [60, 60]))
    assert stop.value.exit_status == 128 + number
    assert time.monotonic() - began < 30
    assert all(not process.is_alive() for process, _ in processes._running.values())
