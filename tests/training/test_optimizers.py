"""What CUDA graphs ask of optimizers, and the learning rate that a captured step reads."""

import copy
from functools import partial

import pytest
import torch
from capturing import as_on_cuda
from step_tasks import digits_steps
from torch import Tensor

from stn_fast.training.optimizers import learning_rate, make_capturable, set_learning_rate


def of(make):
    return make([torch.nn.Parameter(torch.ones(3))])


OPTIMIZERS = {
    "fused sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused adam": partial(torch.optim.Adam, lr=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_on_the_cpu_is_not_changed(name):
    optimizer = of(OPTIMIZERS[name])
    before = copy.deepcopy(optimizer.state_dict())
    make_capturable(optimizer)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_cuda_an_optimizer_keeps_what_it_can_on_the_device(name, monkeypatch):
    as_on_cuda(monkeypatch)
    optimizer = of(OPTIMIZERS[name])
    make_capturable(optimizer)
    (group,) = optimizer.param_groups
    assert group.get("capturable") is (None if "sgd" in name else True)
    assert isinstance(group["lr"], Tensor) == ("fused" in name)
    assert float(group["lr"]) == pytest.approx(0.1)
    assert learning_rate(optimizer) == 0.1  # exactly, though a tensor of float32 holds 0.10000000149011612


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_is_set_where_a_captured_step_reads_it(name, monkeypatch):
    as_on_cuda(monkeypatch)
    optimizer = of(OPTIMIZERS[name])
    make_capturable(optimizer)
    before = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    now = optimizer.param_groups[0]["lr"]
    assert float(now) == 0.25
    assert now is before or "fused" not in name


def test_a_loaded_state_is_made_capturable_again(monkeypatch):
    """Such as one that was saved on the CPU."""
    adam = dict(optimizer=partial(torch.optim.Adam, lr=0.1, fused=True), hyper_optimizer=partial(torch.optim.RMSprop))
    saved = digits_steps(**adam)
    saved.method.train_step(saved.train[0], 0)
    saved.method.valid_step(saved.valid[0], 1)
    as_on_cuda(monkeypatch)
    method = digits_steps(**adam).method
    method.load_state_dict(saved.method.state_dict())
    for optimizer in method.optimizers:
        assert optimizer.param_groups[0]["capturable"]
    assert isinstance(method.optimizer.param_groups[0]["lr"], Tensor)


def test_a_state_of_cuda_is_trained_on_with_on_the_cpu(monkeypatch):
    options = dict(optimizer=partial(torch.optim.Adam, lr=0.1), hyper_optimizer=partial(torch.optim.RMSprop, lr=0.1))
    with monkeypatch.context() as patch:
        as_on_cuda(patch)
        saved = digits_steps(**options)
        saved.method.train_step(saved.train[0], 0)
        saved.method.valid_step(saved.valid[0], 1)
        state = saved.method.state_dict()
    steps = digits_steps(**options)
    steps.method.load_state_dict(state)
    losses = steps.method.train_step(steps.train[1], 2), steps.method.valid_step(steps.valid[1], 3)
    assert all(loss.isfinite() for loss in losses)
    for optimizer in steps.method.optimizers:
        assert not optimizer.param_groups[0]["capturable"]
