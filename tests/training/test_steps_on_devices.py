"""Whole steps on every device: as good as plain torch on the CPU, and captured as they are one by one.

On the CPU graphs are recorded operations (`capturing`), so that every line here runs without a GPU.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from capturing import as_on_cuda
from numerics import assert_twice_as_good
from run_files import result, rows
from step_tasks import OPTIMIZERS, TASKS, cycle

from stn_fast.dispatch import use_backend
from stn_fast.training.capture import CapturedSteps

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
# What they keep is sums of gradients, to all digits: next to a weight its update has few, and Adam's first ones none.
WITH_MOMENTUM = dict(
    optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    hyper_optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9, fused=True),
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request, monkeypatch):
    """Each device by itself: the tuner off, and library calls that repeat their results bit by bit."""
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if request.param == "cpu":
        as_on_cuda(monkeypatch)
    return request.param


def taken(steps, count, captured=False):
    """Losses, all that has been learnt, and what the optimizers keep: on the CPU in float64, by name."""
    method = steps.method
    take = CapturedSteps(method) if captured else method
    found = {"losses": torch.stack(cycle(steps, count, take))}
    if captured:
        assert take.reasons == []
        assert take.replayed > 0
    names = {id(tensor): name for name, tensor in method.model.named_parameters()}
    names |= {id(method.location): "location", id(method.raw_scale): "raw_scale"}
    for optimizer in method.optimizers:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            found[names[id(parameter)]] = parameter
            for key, value in optimizer.state[parameter].items():
                found[f"{key} of {names[id(parameter)]}"] = value
    return {name: value.detach().cpu().double().clone() for name, value in found.items() if value is not None}


def in_units_of(exact, given):
    """All of them in one vector, each tensor in units of its exact length: none outweighs another."""
    assert all(tensor.norm() > 0 for tensor in exact.values())
    return torch.cat([(given[name] / tensor.norm()).flatten() for name, tensor in exact.items()])


@pytest.mark.parametrize(("captured", "count"), [(False, 3), (True, 12)], ids=["one by one", "captured"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_steps_are_as_good_as_plain_torch(task, precision, captured, count, device):
    make = partial(TASKS[task], **WITH_MOMENTUM)
    got = taken(make(device, precision=precision), count, captured)
    with use_backend("reference"):
        plain, exact = taken(make(precision=precision), count), taken(make(dtype=torch.float64), count)
    assert_twice_as_good(*(in_units_of(exact, given) for given in (got, plain, exact)), "all that steps change")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("task", TASKS)
def test_captured_steps_equal_steps_without_a_graph(task, precision, optimizer, device):
    if device == "cpu" and (precision, optimizer) != ("fp32", "adam, rmsprop"):
        pytest.skip("test_capture.py takes these steps on the CPU")
    make = partial(TASKS[task], device, precision=precision, **OPTIMIZERS[optimizer])
    one, captured = (taken(make(), 12, captured=way) for way in (False, True))
    assert one.keys() == captured.keys()
    assert [name for name in one if not torch.equal(one[name], captured[name])] == []


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_does_not_wait_for_the_device(device):
    steps = TASKS["digits"](device)
    take = CapturedSteps(steps.method)
    cycle(steps, 9, take)
    batches = steps.train[20], steps.valid[20]
    with no_waiting() if device == "cuda" else nullcontext():
        for step in range(9, 12):
            take.train_step(batches[0], step)
            take.valid_step(batches[1], step)
    steps.method.check_finite()
    assert take.reasons == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_captures_its_steps(train, same_run, precision, device):
    short = (f"device={device}", f"precision={precision}", "schedule.epochs=3", "method.warmup_epochs=0")
    one, captured = train(*short, "capture=false", name="one"), train(*short, name="captured")
    same_run(one, captured)
    assert rows(captured)[-1]["loss"] < rows(captured)[0]["loss"]
    assert result(captured, timeless=False)["captured"] == {"steps": 27 + 13 - 4, "reasons": []}
