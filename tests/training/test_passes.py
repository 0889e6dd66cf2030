"""Passes of SelfTuner, for loops with their own backward, zero_grad and step: the numbers are those of its steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from small_tuners import EXAMPLES, Checkpointed, assert_same, batch, network, tuner_of, without_statistics
from torch import nn

import stn_fast as stn
from stn_fast.training.parameters import is_gate, is_response


def train(tuner, number, passes=(False, True), clip=1.0, scaler=None):
    """A training step by passes."""
    (x, y), optimizer = batch(number), tuner.method.optimizer
    for antithetic in passes:
        with tuner.training(len(x), antithetic=antithetic):
            loss = (F.cross_entropy(tuner.model(x), y) + tuner.penalty()) / len(passes)
            (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip is not None:
        nn.utils.clip_grad_norm_(tuner.model.parameters(), clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def validate(tuner, number):
    x, y = batch(100 + number)
    with tuner.validating(len(x)):
        loss = F.cross_entropy(tuner.model(x), y)
    return tuner.hyper_step(loss)


@pytest.mark.parametrize(
    ("antithetic", "clip", "tune_scales"), [(True, 1.0, True), (True, 0.1, False), (False, None, True)]
)
def test_passes_are_the_steps_of_the_tuner_bit_for_bit(antithetic, clip, tune_scales):
    options = dict(antithetic=antithetic, clip=clip, tune_scales=tune_scales, seed=5)
    steps, passes = tuner_of(loss=F.cross_entropy, **options), tuner_of(**options)
    for number in range(4):
        steps.train_step(batch(number))
        train(passes, number, (False, True) if antithetic else (False,), clip)
        assert_same(passes, steps)
        assert torch.equal(steps.valid_step(batch(100 + number)), validate(passes, number))
        assert_same(passes, steps)
    assert steps.history == passes.history


@pytest.mark.parametrize("model", [network, Checkpointed])
def test_each_part_of_an_accumulated_batch_has_a_draw_of_its_own(model):
    """Against gradients through `using`, and the division of those of R and r written out."""
    tuner = tuner_of(model(), seed=3)
    reference, parts = copy.deepcopy(tuner.model), [batch(0), batch(1, 5)]
    before = {name: parameter.detach().clone() for name, parameter in tuner.model.named_parameters()}
    for x, y in parts:
        with tuner.training(len(x)):
            (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    own, squares = reference.tuned_hyperparameters, []
    for number, (x, y) in enumerate(parts):
        hyper = own.space.sample(own.location, own.raw_scale, batch_size=len(x), seed=3, step=number)
        squares.append(hyper.response.T @ hyper.response / len(x))
        with own.using(hyper):
            loss = F.cross_entropy(reference(x), y)
            for layer in reference.modules():
                if isinstance(layer, nn.Linear):
                    loss = loss + layer.weight_decay_penalty(hyper, hyper["weight_decay"])
            loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in tuner.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-7)
    tuner.method.optimizer.step()
    moments, named = sum(squares) / 2, dict(reference.named_parameters())
    for name, parameter in tuner.model.named_parameters():
        change = -0.05 * gradients[name]
        if is_response(name) and not is_gate(name) and "projection" not in name:
            gate = named[name.replace("response_weight", "weight_gate").replace("response_bias", "bias_gate")]
            size = ((gate @ moments) * gate).sum(1).clamp(min=1)
            assert size.max() > 2
            change = change / size.view(-1, *[1] * (change.ndim - 1))
        torch.testing.assert_close(parameter, before[name] + change, rtol=1e-5, atol=1e-7)
    assert (tuner.draws, tuner.trained) == (2, 1)


def test_a_loss_scaled_by_a_grad_scaler_gives_the_same_steps():
    plain, scaled = tuner_of(), tuner_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(3):
        train(plain, number)
        train(scaled, number, scaler=scaler)
        validate(plain, number)
        validate(scaled, number)
    assert_same(plain, scaled)


def test_passes_whose_gradients_a_grad_scaler_refused_do_not_count():
    (x, y), tuner, other = batch(0), tuner_of(without_statistics()), tuner_of(without_statistics())
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), tuner.method.optimizer
    before = [parameter.detach().clone() for parameter in tuner.model.parameters()]
    with tuner.training(EXAMPLES):
        scaler.scale(F.cross_entropy(tuner.model(x), y) * math.inf + tuner.penalty()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(map(torch.equal, tuner.model.parameters(), before))
    other.draws = 1
    for one in (tuner, other):
        train(one, 1)
    assert_same(tuner, other)
    assert tuner.trained == 1


def test_passes_before_a_training_step_do_not_change_it():
    (x, y), tuner, other = batch(0), *(tuner_of(without_statistics(), F.cross_entropy) for _ in range(2))
    with tuner.training(EXAMPLES):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    other.draws = 1
    for one in (tuner, other):
        one.train_step(batch(1))
    assert_same(tuner, other)
    assert tuner.trained == 1


def test_a_wrapped_optimizer_divides_gradients_of_the_response_too():
    class Wrapper(torch.optim.Optimizer):
        """As that of Accelerate."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)

        def step(self, closure=None):
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none=False):
            self.optimizer.zero_grad(set_to_none=set_to_none)

        def state_dict(self):
            return self.optimizer.state_dict()

    plain, tuned = tuner_of(), respond(stn.convert(network(), quiet=True))
    tuned.tuned_hyperparameters.raw_scale.fill_(2.5)
    wrapped = stn.SelfTuner(tuned, Wrapper(torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9)))
    for number in range(2):
        train(plain, number)
        train(wrapped, number)
    assert_same(plain, wrapped)


def test_the_penalty_is_that_of_the_pass():
    tuner = tuner_of()
    with tuner.training(EXAMPLES):
        tuner.model(batch(0)[0])
        hyper = tuner.model.tuned_hyperparameters.current
        penalty = tuner.penalty()
    want = 0.0
    for layer in (tuner.model[0], tuner.model[4]):
        response = layer.gated_parameters.whole_response
        weights = layer.weight + (hyper.response @ layer.weight_gate.T)[:, :, None] * response
        want += (0.5 * hyper["weight_decay"] * weights.square().sum((1, 2))).mean()
    torch.testing.assert_close(penalty, want)
    assert penalty > 0


def test_the_penalty_is_0_in_a_space_without_weight_decay():
    space = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3)])
    tuned = stn.convert(network(), space, quiet=True)
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1))
    with tuner.training(EXAMPLES):
        tuned(batch(0)[0])
        assert tuner.penalty() == 0
