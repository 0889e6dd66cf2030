"""Passes check, when they first call the model, which examples the rows of its layers belong to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_tuners import EXAMPLES, assert_same, batch, tuner_of
from torch import nn


class Reversed(nn.Sequential):
    """Its layers are called with the examples in the reverse order."""

    def forward(self, x):
        return super().forward(x.flip(0))


class AfterZeros(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.reversed = nn.Linear(6, 6), Reversed(nn.Linear(6, 4))
        nn.init.zeros_(self.first.weight)

    def forward(self, x):
        return self.reversed(self.first(x))


class Wrapper(nn.Module):
    """Calls a model as DistributedDataParallel and the wrappers of trainers do."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def reversed_tuner(**options):
    torch.manual_seed(0)
    return tuner_of(Reversed(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4)), **options)


def run(tuner, kind="training", model=None, examples=EXAMPLES, size=None):
    x, y = batch(0, examples)
    with getattr(tuner, kind)(size or examples):
        loss = F.cross_entropy((model or tuner.model)(x), y)
        if kind == "training":
            (loss + tuner.penalty()).backward()


def hooks(tuner):
    return [hook for module in tuner.model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.mark.parametrize("kind", ["training", "validating"])
@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_rows_in_another_order_are_refused_in_every_pass(kind, wrap):
    tuner = reversed_tuner()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0 \(Linear\) has rows .* do not follow the order of the examples"):
            run(tuner, kind, wrap(tuner.model))
        assert not hooks(tuner)
    assert all(parameter.grad is None for parameter in tuner.model.parameters())


@pytest.mark.parametrize("kind", ["training", "validating"])
def test_a_batch_size_of_which_the_input_has_a_multiple_is_refused(kind):
    for size in (1, 2):
        with pytest.raises(ValueError, match=rf"{kind}: batch_size must be .*, got {size} and an input \(4, 6\)"):
            run(tuner_of(), kind, examples=4, size=size)
    run(tuner_of(check_rows=False), kind, examples=4, size=2)


def test_nothing_is_checked_if_the_tuner_is_told_so():
    tuner = reversed_tuner(check_rows=False)
    run(tuner)
    run(tuner, "validating")


def test_only_the_first_pass_is_checked(monkeypatch):
    calls = []
    monkeypatch.setattr("stn_fast.training.pass_rows.check_rows", lambda model, *given: calls.append(len(given[0])))
    tuner = tuner_of()
    for examples in (8, 4):  # as with gradient accumulation
        run(tuner, examples=examples)
    run(tuner, "validating")
    assert calls == [8]


def test_the_first_call_of_the_model_is_checked_after_passes_without_one(monkeypatch):
    calls, x = [], batch(0)[0]
    monkeypatch.setattr("stn_fast.training.pass_rows.check_rows", lambda model, *given: calls.append(1))
    tuner = tuner_of()
    for _ in range(12):
        with pytest.raises(KeyError), tuner.training(EXAMPLES):
            raise KeyError
        assert not hooks(tuner)
    tuner.model.eval()(x)
    assert not calls
    run(tuner)
    assert len(calls) == 1


def test_rows_that_were_equal_in_the_first_pass_are_checked_in_the_next():
    tuner = tuner_of(AfterZeros())
    nn.init.zeros_(tuner.model.first.response_weight)
    run(tuner)
    nn.init.ones_(tuner.model.first.weight)
    with pytest.raises(ValueError, match=r"reversed\.0 \(Linear\) has rows"):
        run(tuner)


def test_rows_that_stay_equal_are_checked_in_ten_passes(monkeypatch):
    calls = []
    monkeypatch.setattr("stn_fast.training.pass_rows.check_rows", lambda *given: calls.append(1) or ["layer"])
    tuner = tuner_of()
    for _ in range(12):
        run(tuner)
    assert len(calls) == 10


def test_examples_may_be_counted_by_the_second_dimension():
    class TimeMajor(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.out(self.lstm(x)[0][-1])

    tuner, x = tuner_of(TimeMajor()), torch.randn(6, 3, 6)
    with tuner.training(3):
        (tuner.model(x).sum() + tuner.penalty()).backward()


def test_the_check_is_in_the_autocast_of_the_loop():
    tuner, (x, y) = tuner_of(), batch(0)
    with tuner.training(EXAMPLES), torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(tuner.model(x.bfloat16()), y)
        (loss + tuner.penalty()).backward()
    assert tuner._rows.left == 0


def compilations(**options):
    torch._dynamo.reset()
    found, tuner = [], tuner_of(nn.Sequential(nn.Linear(6, 4)), **options)
    model = torch.compile(tuner.model, backend=lambda graph, _: found.append(1) or graph.forward)
    for _ in range(12):
        run(tuner, model=model)
    return len(found)


def test_a_compiled_model_is_compiled_as_often_as_without_the_check():
    assert compilations() == compilations(check_rows=False) > 0


def test_passes_are_bit_for_bit_the_same_after_the_check():
    one, other = tuner_of(), tuner_of(check_rows=False)
    for tuner in (one, other):
        torch.manual_seed(0)
        for _ in range(3):
            run(tuner)
            x, y = batch(1)
            with tuner.validating(EXAMPLES):
                loss = F.cross_entropy(tuner.model(x), y)
            tuner.hyper_step(loss)
    assert_same(one, other)
    assert not hooks(one)
    copy.deepcopy(one.model)
