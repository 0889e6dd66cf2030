"""SIGTERM and SIGUSR1 to one of two processes, in every phase of a run."""

import pytest
from gloo_signals import PHASES
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
