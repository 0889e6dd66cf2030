"""The autotuner with a clock of its own, so that what it decides can be known."""

import ast
import json
import math
import multiprocessing
import time

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from stn_fast.kernels import autotune
from stn_fast.kernels.autotune import Autotuner

CPU = torch.device("cpu")
TIMES = {"library": 3.0, "slow": 9.0, "fast": 1.0}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)


class Clock:
    """Times a candidate by its name, and remembers which it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, candidate):
        self.asked.append(candidate())
        return TIMES[candidate()]


def candidates():
    return {name: lambda name=name: name for name in TIMES}


def choose(tuner, key="problem"):
    return tuner.choose(key, candidates(), "library", CPU)


def test_the_fastest_candidate_is_chosen_and_timed_once():
    clock = Clock()
    tuner = Autotuner(clock)
    assert [choose(tuner), choose(tuner)] == ["fast", "fast"]
    assert sorted(clock.asked) == sorted(TIMES)


def test_a_choice_is_kept_for_later_runs():
    choose(Autotuner(Clock()))
    choose(Autotuner(Clock()), "another problem")
    clock = Clock()
    assert choose(Autotuner(clock)) == "fast"
    assert clock.asked == []
    assert json.loads(autotune.cache_file().read_text()) == {"problem": "fast", "another problem": "fast"}


def test_a_choice_that_no_longer_exists_is_made_again():
    autotune.cache_file().parent.mkdir(parents=True)
    autotune.cache_file().write_text('{"problem": "removed"}')
    assert choose(Autotuner(Clock())) == "fast"


@pytest.mark.parametrize("content", ['{"problem": ', "[1]", '{"problem": 3}', "\x00"])
def test_a_damaged_file_is_reported_and_replaced(content):
    autotune.cache_file().parent.mkdir(parents=True)
    autotune.cache_file().write_text(content)
    with pytest.warns(UserWarning, match=r"autotune\.json is ignored"):
        assert choose(Autotuner(Clock())) == "fast"
    assert json.loads(autotune.cache_file().read_text()) == {"problem": "fast"}


def test_a_directory_that_cannot_be_written_costs_a_warning_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match=r"file/below/autotune\.json"):
        assert choose(Autotuner(Clock())) == "fast"


def test_nothing_is_timed_when_switched_off(monkeypatch):
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    clock = Clock()
    assert choose(Autotuner(clock)) == "library"
    assert clock.asked == []


def test_deterministic_algorithms_take_the_default_even_over_a_remembered_choice():
    tuner = Autotuner(Clock())
    choose(tuner)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(tuner) == "library"
    finally:
        torch.use_deterministic_algorithms(False)


def test_capture_times_nothing_but_keeps_to_remembered_choices(monkeypatch):
    tuner = Autotuner(Clock())
    choose(tuner)
    monkeypatch.setattr(autotune, "_capturing", lambda: True)
    assert choose(tuner) == "fast"
    assert choose(tuner, "new problem") == "library"


def test_the_cpu_is_never_timed():
    assert choose(Autotuner()) == "library"


def test_sizes_that_share_a_bucket_share_a_choice():
    assert autotune.size_bucket(1000) == autotune.size_bucket(1023) == "1024u"
    assert autotune.size_bucket(1024) == "1024" != autotune.size_bucket(1023)


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        CompilationError("def f(): pass", ast.parse("0").body[0], "no"),
        PTXASError("no"),
        torch.OutOfMemoryError("no"),
        autotune.Refused("wrong results"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_candidate_that_does_not_run_here_is_never_the_fastest(monkeypatch, error):
    def fail(candidate, **_):
        raise error

    monkeypatch.setattr(autotune.triton.testing, "do_bench", fail)
    assert autotune.milliseconds(lambda: None) == math.inf


def test_a_mistake_in_a_candidate_is_not_taken_for_one_that_does_not_run_here(monkeypatch):
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda candidate, **_: candidate())
    with pytest.raises(ZeroDivisionError):
        autotune.milliseconds(lambda: 1 / 0)


@pytest.mark.parametrize("failing", [{"library"}, set(TIMES)], ids=["the default", "all"])
def test_nothing_is_remembered_of_a_moment_when_the_default_did_not_run(failing):
    moments = [failing, set()]
    tuner = Autotuner(lambda candidate: math.inf if candidate() in moments[0] else TIMES[candidate()])
    assert choose(tuner) == "library"
    assert not autotune.cache_file().exists()
    del moments[0]
    assert choose(tuner) == "fast"


def write_slowly(key, barrier):
    tuner = Autotuner(Clock())
    read = tuner._read

    def slow():
        choices = read()
        time.sleep(0.3)
        return choices

    tuner._read = slow
    barrier.wait(60)
    tuner._write(key, "fast")


def test_processes_that_write_at_once_lose_nothing():
    pytest.importorskip("fcntl")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    keys = ["first", "second", "third"]
    processes = [context.Process(target=write_slowly, args=(key, barrier)) for key in keys]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert json.loads(autotune.cache_file().read_text()) == dict.fromkeys(keys, "fast")


def test_the_choice_is_kept_where_files_cannot_be_locked(monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert choose(Autotuner(Clock())) == "fast"
    assert json.loads(autotune.cache_file().read_text()) == {"problem": "fast"}
