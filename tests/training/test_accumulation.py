"""Steps in parts are the steps of the whole batch, up to rounding, and need memory for one part only."""

import warnings
from functools import partial

import gloo_runs
import pytest
import torch
import torch.nn.functional as F
from capturing import as_on_cuda
from run_files import rows
from step_tasks import TASKS, cycle, digits_steps, language_steps
from torch import nn
from torch.profiler import ProfilerActivity, profile

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.errors import UserError
from stn_fast.training.accumulation import parts_of
from stn_fast.training.batches import as_batch
from stn_fast.training.capture import CapturedSteps
from stn_fast.training.config import ConfigError
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.methods import FixedHyperparameters, SelfTuning
from stn_fast.training.one_pass import OnePass
from stn_fast.training.task import classification_loss

# The networks compute in float64. λ, σ and the draws are float32, and the gradients of λ and σ are sums over examples,
# which parts add up in another order: that may change the last of 24 bits, at each step.
ROUNDING = 1e-6
CLIPS = dict(clip=0.05)  # below every norm of a gradient


def fixed(model, space, training_objective, validation_objective, **options):
    return FixedHyperparameters(model, space, training_objective, **options)


METHODS = {
    "stn": {},
    "published": dict(antithetic=False, tune_scales=False),
    "delta-stn": dict(make=DeltaSelfTuning),
    "fixed": dict(make=fixed),
}
FIXED = [("digits", "fixed"), ("language model", "fixed")]


def learnt(method):
    """Weights, hyperparameters and states of optimizers, in one vector."""
    state = [one for optimizer in method.optimizers for one in optimizer.state.values()]
    moments = [value for one in state for value in one.values() if isinstance(value, torch.Tensor)]
    tensors = [*method.model.state_dict().values(), method.location, method.raw_scale, *moments]
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def steps_of(method, steps, count=5):
    if method.tunes:
        return torch.stack(cycle(steps, count))
    return torch.stack([method.train_step(steps.train[step], step) for step in range(count)])


@pytest.mark.parametrize(
    ("task", "method"),
    [*((task, method) for task in TASKS for method in ("stn", "delta-stn")), ("digits", "published"), *FIXED],
)
def test_steps_in_parts_of_unequal_size_are_those_of_the_whole_batch(task, method):
    """Clipped by the norm of the whole gradient, and with the states of a text's columns."""
    whole, parts = (
        TASKS[task](dtype=torch.float64, accumulation=count, **CLIPS, **METHODS[method]) for count in (1, 3)
    )
    for steps in (whole, parts):
        for name, parameter in steps.method.model.named_parameters():
            if "gate" in name:
                parameter.data *= 20  # E[s²] of a gate is above 1, by which gradients of the response are divided
    first = as_batch(parts.train[0], torch.device("cpu"))
    assert {part.batch.examples for part in parts_of(first, 3)} == {first.examples // 3 + extra for extra in (0, 1)}
    losses = [steps_of(one.method, one) for one in (whole, parts)]
    torch.testing.assert_close(losses[1], losses[0], rtol=ROUNDING, atol=0)
    one, other = (learnt(steps.method) for steps in (whole, parts))
    assert (one - other).norm() < ROUNDING * one.norm()
    assert not torch.equal(one, other), "the batch was not split"


def test_running_statistics_are_the_means_of_those_of_the_parts():
    """As with several processes: a step updates them once, not once for each part."""
    space = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.2)])
    x, y = torch.randn(7, 3).double() + torch.arange(7)[:, None], torch.zeros(7, dtype=torch.int64)

    def statistics(accumulation, antithetic):
        layers = nn.BatchNorm1d(3), stn.HyperLinear(3, 2, num_hyperparameters=1)
        model = nn.ModuleList(layers).double()

        def loss(model, batch, hyper):
            hyper["dropout"]
            return F.cross_entropy(model[1](model[0](batch.inputs), hyper), batch.targets)

        method = SelfTuning(model, space, loss, loss, accumulation=accumulation, antithetic=antithetic)
        method.train_step(Split(x, y), 0)
        return model[0]

    for antithetic in (False, True):
        norm = statistics(3, antithetic)
        parts = [x[:2], x[2:4], x[4:]]
        mean = sum(len(part) / 7 * part.mean(0) for part in parts)
        variance = sum(len(part) / 7 * part.var(0) for part in parts)
        torch.testing.assert_close(norm.running_mean, 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
        assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("task", [digits_steps, language_steps])
def test_a_step_in_parts_that_is_not_finite_is_skipped_once_and_changes_nothing(task):
    steps = task(accumulation=3, skip_nonfinite=1)
    method = steps.method
    method.train_step(steps.train[0], 0)
    before = learnt(method)
    weight = next(one for one in method.model.parameters() if one.ndim > 1)
    place, kept = (0, 0), weight[0, 0].item()
    with torch.no_grad():
        weight[place] = torch.nan
    with pytest.warns(RuntimeWarning, match="the training loss is nan at step 1; left out, 1 of 1 in a row"):
        method.train_step(steps.train[1], 1)
    with torch.no_grad():
        weight[place] = kept
    assert method.skipped_steps == 1
    assert torch.equal(learnt(method), before)
    method.train_step(steps.train[2], 2)  # a text goes on from a zero state
    assert not torch.equal(learnt(method), before)


def peak_bytes(work):
    """The most memory that torch holds during `work`, beyond that of before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("kind", ["train_step", "valid_step"])
def test_parts_need_the_memory_of_one_of_them(kind):
    """Activations are nearly all that a step of a large batch needs: a quarter, and gradients, with four parts."""
    found = []
    for accumulation in (1, 4):
        steps = digits_steps(accumulation=accumulation)
        data = steps.train.split
        large = Split(*(part.repeat(10, *[1] * (part.ndim - 1))[:8000] for part in data))
        step = partial(getattr(steps.method, kind), large)
        step(0)  # momentum stays from here on
        for tensor in (*steps.method.model.parameters(), *steps.method.tuned):
            tensor.grad = None
        found.append(peak_bytes(partial(step, 1)))
    assert found[1] < 0.35 * found[0]


@pytest.mark.parametrize("task", ["digits", "language model"])
def test_captured_steps_in_parts_give_the_same_bits(task, monkeypatch):
    as_on_cuda(monkeypatch)
    one, other = (TASKS[task](accumulation=3) for _ in range(2))
    steps = CapturedSteps(other.method, warn=lambda reason: None)
    losses = cycle(one, 11), cycle(other, 11, steps)
    assert torch.equal(*map(torch.stack, losses))
    assert torch.equal(learnt(one.method), learnt(other.method))
    assert steps.reasons == []
    assert steps.replayed > 5


def test_a_run_in_parts_is_resumed_bit_for_bit_and_is_that_of_whole_batches(tmp_path):
    """It is stopped in the middle of a pass over the text, where each part has the state of its own columns."""
    gloo_runs.write_texts(tmp_path)
    parts = "schedule.accumulation=3"
    gloo_runs.run_in(tmp_path / "stopped", "text", parts, "schedule.max_steps=7")
    for folder in ("stopped", "parts"):
        gloo_runs.run_in(tmp_path / folder, "text", parts)
    gloo_runs.run_in(tmp_path / "whole", "text")
    stopped, parts, whole = (rows(tmp_path / folder / "text") for folder in ("stopped", "parts", "whole"))
    assert [row for row in stopped if row["step"] != 7] == parts
    for found, expected in zip(parts, whole, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=gloo_runs.ROUNDING)
        assert found.get("hyperparameters", {}) == pytest.approx(
            expected.get("hyperparameters", {}), rel=gloo_runs.ROUNDING
        )
    assert parts != whole


def test_a_batch_that_can_not_be_split_is_an_error_that_names_it():
    class Whole:
        examples, begins = 4, False

    with pytest.raises(UserError, match="a batch that is a Whole has no method split"):
        parts_of(Whole(), 2)
    assert parts_of(Whole(), 1)[0].weight == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["schedule.accumulation=0"], r"schedule\.accumulation = 0: must be at least 1"),
        (["schedule.accumulation=101"], "must be at most 100, the smaller of batch_size and valid_batch_size"),
        (["schedule.accumulation=2", "method.name=one-pass"], "must be 1 for --method one-pass"),
    ],
)
def test_settings_that_do_not_fit_are_errors(make_config, settings, says):
    with pytest.raises(ConfigError, match=says):
        make_config(*settings)


def test_one_pass_tuning_refuses_parts():
    space = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.2)])
    with pytest.raises(ValueError, match="OnePass: accumulation must be 1"):
        OnePass(nn.Linear(2, 2), space, classification_loss, classification_loss, accumulation=2)


def test_a_method_with_another_number_of_parts_than_the_configuration_is_an_error(make_config):
    from stn_fast.recipes import digits
    from stn_fast.training.build import build_method
    from stn_fast.training.run import run

    config = make_config("schedule.accumulation=2")

    def make_method(config, task):
        method = build_method(config, task)
        method.accumulation = 1
        return method

    with pytest.raises(ConfigError, match=r"schedule\.accumulation = 2: must be that of make_method's, 1"):
        run(config, digits.build, make_method=make_method)


def test_numbers_are_drawn_for_the_examples_that_they_belong_to():
    """With one example in each part, every draw of a layer is that of its example of the whole batch."""
    one, other = (digits_steps(dtype=torch.float64, accumulation=count) for count in (1, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [steps.method.train_step(steps.train[0], 5, first_example=11) for steps in (one, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=ROUNDING, atol=0)
