"""The autotuner with a clock of its own, so that what it decides can be known."""

import ast
import json
import math
import multiprocessing
import re
import subprocess
import sys
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
    monkeypatch.setattr(autotune, "TABLES", tmp_path / "tuned")
    caches = (autotune.versions, autotune.shipped, autotune._device_name)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Clock:
    """Times a candidate by its name, and remembers which it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, candidate):
        self.asked.append(candidate())
        return TIMES[candidate()]


def itself(name):
    return name


def choose(tuner, problem="problem", device=CPU):
    return tuner.choose(problem, TIMES, itself, "library", device)


def remembered():
    """What the file says, by problem."""
    choices = json.loads(autotune.cache_file().read_text())
    assert all(key.startswith(autotune.environment("cpu")) for key in choices)
    return {key.removeprefix(autotune.environment("cpu")): name for key, name in choices.items()}


def write_cache(content):
    autotune.cache_file().parent.mkdir(parents=True)
    autotune.cache_file().write_text(content)


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
    assert remembered() == {"problem": "fast", "another problem": "fast"}


def test_a_choice_that_no_longer_exists_is_made_again():
    write_cache(json.dumps({f"{autotune.environment('cpu')}problem": "removed"}))
    assert choose(Autotuner(Clock())) == "fast"
    assert remembered() == {"problem": "fast"}


@pytest.mark.parametrize("changed", ["triton", "torch", "kernels"])
def test_another_triton_torch_or_source_of_the_kernels_is_measured_anew(monkeypatch, changed):
    choose(Autotuner(Clock()))
    if changed == "kernels":
        monkeypatch.setattr(autotune, "kernels_version", lambda _: "others")
    else:
        monkeypatch.setattr(getattr(autotune, changed), "__version__", "9.9")
    autotune.versions.cache_clear()
    clock = Clock()
    assert choose(Autotuner(clock)) == "fast"
    assert sorted(clock.asked) == sorted(TIMES)


def test_the_kernels_version_is_that_of_their_sources(tmp_path):
    (tmp_path / "cuda").mkdir()
    sources = [tmp_path / "a.py", tmp_path / "cuda" / "b.cu", tmp_path / "cuda" / "c.h"]
    for source in sources:
        source.write_text("1")
    seen = {autotune.kernels_version(tmp_path)}
    for source in sources:
        source.write_text("2")
        seen.add(autotune.kernels_version(tmp_path))
    sources[0].rename(tmp_path / "d.py")
    seen.add(autotune.kernels_version(tmp_path))
    (tmp_path / "tuned.json").write_text("{}")
    seen.add(autotune.kernels_version(tmp_path))
    assert len(seen) == 5


@pytest.mark.parametrize("content", ['{"problem": ', "[1]", '{"problem": 3}', "\x00"])
def test_a_damaged_file_is_reported_and_replaced(content):
    write_cache(content)
    with pytest.warns(UserWarning, match=r"autotune\.json is ignored"):
        assert choose(Autotuner(Clock())) == "fast"
    assert remembered() == {"problem": "fast"}


def test_a_directory_that_cannot_be_written_costs_a_warning_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match=r"file/below/autotune\.json"):
        assert choose(Autotuner(Clock())) == "fast"


def test_nothing_is_timed_when_switched_off_but_what_is_known_holds(monkeypatch):
    choose(Autotuner(Clock()), "known")
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    clock = Clock()
    tuner = Autotuner(clock)
    assert [choose(tuner), choose(tuner), choose(tuner, "known")] == ["library", "library", "fast"]
    assert clock.asked == []
    monkeypatch.delenv("STN_FAST_AUTOTUNE")
    assert choose(tuner) == "fast"  # a guess is not kept once it can be timed


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
    monkeypatch.setattr(autotune, "capturing", lambda: True)
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
        RuntimeError("PassManager::run failed"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        autotune.Refused("wrong results"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
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


class Worse(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        Worse("Triton Error [CUDA]: out of memory"),
        ValueError("PassManager::run failed"),
    ],
    ids=str,
)
def test_an_error_of_ours_is_never_taken_for_a_candidate_that_does_not_run_here(monkeypatch, error):
    def fail(candidate, **_):
        raise error

    monkeypatch.setattr(autotune.triton.testing, "do_bench", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        autotune.milliseconds(lambda: None)


@pytest.mark.parametrize("failing", [{"library"}, set(TIMES)], ids=["the default", "all"])
def test_nothing_is_remembered_of_a_moment_when_the_default_did_not_run(failing):
    moments = [failing, set()]
    tuner = Autotuner(lambda candidate: math.inf if candidate() in moments[0] else TIMES[candidate()])
    assert choose(tuner) == "library"
    assert not autotune.cache_file().exists()
    del moments[0]
    assert choose(tuner) == "fast"


def test_sizes_without_end_do_not_fill_memory(monkeypatch):
    monkeypatch.setattr(autotune, "MOST_KNOWN", 10)
    tuner = Autotuner(Clock())
    problems = [autotune.Problem(("forward",), (size,)) for size in range(1, 35)]
    assert {choose(tuner, problem) for problem in problems} == {"fast"}
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    new = [problem._replace(operation=("backward",)) for problem in problems]
    assert {choose(tuner, problem) for problem in new} == {"library"}
    assert 0 < len(tuner._own) <= 10
    assert 0 < len(tuner._guessed) <= 10


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
    assert remembered() == {"problem": "fast"}


OPERATION = ("forward", torch.bfloat16, "n16")


def table(choices, **changed):
    """Ships a table for the device that these tests compute on."""
    file = autotune.table_file("cpu")
    file.parent.mkdir()
    content = {"format": autotune.TABLE_FORMAT, "device": "cpu", "versions": "some", "choices": choices}
    file.write_text(json.dumps(content | changed))


@pytest.fixture
def no_timing(monkeypatch):
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")


def test_the_shipped_choice_is_that_of_the_nearest_alike_problem(no_timing):
    table(
        {
            "forward torch.bfloat16 n16 | 1024 256 64": "slow",  # 2 + 0 + 1 away
            "forward torch.bfloat16 n16 | 4096 512 64": "fast",  # 0 + 1 + 1
            "forward torch.bfloat16 n16 | 4096 256u 128": "library",  # not aligned alike
            "forward torch.float32 n16 | 4096 256 128": "library",  # another dtype
            "backward torch.bfloat16 n16 | 4096 256 128": "library",  # another operation
            "forward torch.bfloat16 n16 | 4096 256": "library",  # of two sizes
            "forward torch.bfloat16 n16 | 4096 256 128": "removed",  # of another release
        }
    )
    problem = autotune.Problem(OPERATION, (4096, 256, 128))
    assert choose(Autotuner(Clock()), problem) == "fast"
    assert choose(Autotuner(Clock()), problem._replace(sizes=(512, 256, 128))) == "slow"
    assert choose(Autotuner(Clock()), problem._replace(sizes=(512, 250, 128))) == "library"


def test_what_this_machine_has_measured_comes_before_what_is_shipped(no_timing, monkeypatch):
    problem = autotune.Problem(OPERATION, (4096, 256, 128))
    table({str(problem): "slow"})
    monkeypatch.delenv("STN_FAST_AUTOTUNE")
    tuner = Autotuner(Clock())
    monkeypatch.setattr(autotune, "capturing", lambda: True)
    assert choose(tuner, problem) == "slow"
    monkeypatch.setattr(autotune, "capturing", lambda: False)
    assert choose(tuner, problem) == "fast"  # timed
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    assert [choose(tuner, problem), choose(Autotuner(Clock()), problem)] == ["fast", "fast"]


def test_deterministic_algorithms_ignore_the_shipped_table(no_timing):
    problem = autotune.Problem(OPERATION, (4096, 256, 128))
    table({str(problem): "slow"})
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(Autotuner(Clock()), problem) == "library"
    finally:
        torch.use_deterministic_algorithms(False)


UNREADABLE = ["not JSON", "[]", '{"format": 9, "choices": {}}', '{"format": 1}', '{"format": 1, "choices": {"a": 3}}']


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_damaged_or_unknown_table_is_reported_and_ignored(no_timing, content):
    table({})
    autotune.table_file("cpu").write_text(content)
    with pytest.warns(UserWarning, match=r"tuned/cpu\.json is ignored"):
        assert choose(Autotuner(Clock())) == "library"


def test_a_table_file_has_the_name_of_its_device():
    assert autotune.table_file("NVIDIA H100 80GB HBM3").name == "NVIDIA_H100_80GB_HBM3.json"


def test_what_was_measured_is_exported_as_a_table_that_can_be_shipped(monkeypatch):
    tuner, problem = Autotuner(Clock()), autotune.Problem(OPERATION, (4096, 256, 128))
    with pytest.raises(ValueError, match="has no choice for 'cpu'"):
        autotune.export(autotune.TABLES, "cpu", tuner)
    choose(tuner, problem)
    tuner._write("another device | problem", "slow")
    autotune.TABLES.mkdir()
    written = autotune.export(autotune.TABLES, "cpu", tuner)
    assert written == autotune.table_file("cpu")
    assert json.loads(written.read_text())["choices"] == {str(problem): "fast"}
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    monkeypatch.setenv("STN_FAST_CACHE", str(written.parent / "empty"))
    assert choose(Autotuner(Clock()), problem) == "fast"


def test_the_command_can_be_called_with_arguments(tmp_path):
    choose(Autotuner(Clock()))
    assert autotune.main(["--device", "cpu", "--export", str(tmp_path)]) == 0
    assert (tmp_path / autotune.table_file("cpu").name).exists()


def test_the_command_exports_the_users_choices(tmp_path):
    choose(Autotuner(Clock()))
    command = [sys.executable, "-m", "stn_fast.kernels.autotune", "--device", "cpu", "--export"]
    target = tmp_path / "table.json"
    subprocess.run([*command, target], check=True)
    assert json.loads(target.read_text())["choices"] == {"problem": "fast"}
    failed = subprocess.run([*command[:-2], "none", "--export", target], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "has no choice for 'none'" in failed.stderr


def test_every_shipped_table_can_be_read():
    shipped = sorted(autotune.Path(autotune.__file__).with_name("tuned").glob("*.json"))
    for file in shipped:
        content = json.loads(file.read_text())
        assert content["format"] == autotune.TABLE_FORMAT
        assert file.name == autotune.table_file(content["device"]).name
        assert autotune._choices(content["choices"])
