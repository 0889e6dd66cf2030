"""SIGTERM and SIGUSR1 to one of two processes in every phase of a run, and a full disk for the one that writes."""

import pytest
from gloo_signals import PHASES
from run_files import result, rows
from signalled_runs import check_signal, launch

STOPPED = {"warm-up": 3, "evaluation": 12, "checkpoint": 12}  # after which step; the others are in the second epoch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    launch(folder)
    return folder / "run"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("phase", PHASES)
def test_it_ends_both_and_the_run_goes_on_exactly(tmp_path, whole, phase, name):
    step = check_signal(tmp_path, phase, name, whole)
    if phase == "checkpoint":
        assert step >= STOPPED[phase]  # training goes on beside it
    else:
        assert step == STOPPED.get(phase, step)
        assert step > 12 or phase in STOPPED


def test_an_error_of_the_thread_that_writes_ends_both_and_the_run_goes_on_exactly(tmp_path, whole):
    for said in launch(tmp_path, "disk", status=1):
        assert f"cannot write {tmp_path}/run/checkpoints/step-00000012 (No space left on device)" in said
    first, _ = launch(tmp_path, "disk")
    assert "resuming" in first
    assert "after step 0" in first
    assert rows(tmp_path / "run") == rows(whole)
    assert result(tmp_path / "run") == result(whole)
