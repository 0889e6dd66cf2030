"""Passes of SelfTuner(method="delta-stn"): of the weights, and of the response."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from small_tuners import assert_same_model, batch, network, snapshot, tuner_of
from torch import nn

import stn_fast as stn
from stn_fast.training.parameters import is_response

delta = partial(tuner_of, method="delta-stn")


def train(tuner, number, passes=(False, True)):
    """A training step by passes: one of the weights and those of the response."""
    (x, y), optimizer = batch(number), tuner.method.optimizer
    of_response = tuner.method.response_optimizer
    optimizer.zero_grad()
    with tuner.training(len(x)):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    nn.utils.clip_grad_norm_(tuner.model.parameters(), 1.0)
    optimizer.step()
    of_response.zero_grad()
    for antithetic in passes:
        with tuner.responding(len(x), antithetic=antithetic) as linearised:
            ((F.cross_entropy(linearised(x), y) + tuner.penalty()) / len(passes)).backward()
    nn.utils.clip_grad_norm_([p for group in of_response.param_groups for p in group["params"]], 1.0)
    of_response.step()


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("own", [None, partial(torch.optim.SGD, lr=0.2)], ids=["one optimizer", "two"])
def test_passes_are_the_general_and_the_response_step_bit_for_bit(antithetic, own):
    steps, passes = (delta(antithetic=antithetic, response_optimizer=own, seed=3) for _ in range(2))
    for k in range(3):
        steps.method.general_step(batch(k), 3 * k)
        steps.method.response_step(batch(k), 3 * k + 1)
        train(passes, k, (False, True) if antithetic else (False,))
        assert_same_model(steps.model, passes.model)
        x, y = batch(100 + k)
        with passes.validating(len(x)):
            loss = F.cross_entropy(passes.model(x), y)
        assert torch.equal(passes.hyper_step(loss), steps.method.valid_step((x, y), 3 * k + 2))
        assert_same_model(steps.model, passes.model)
    assert (passes.draws, passes.trained, passes.validated) == (9, 3, 3)


def test_both_passes_of_all_parts_of_a_batch_may_share_a_step_of_one_optimizer():
    tuner, reference = delta(seed=3), delta(seed=3)
    method, responses, gradients = reference.method, [], {}
    before, location = snapshot(tuner.model), method.location.detach()
    for k in range(2):
        x, y = batch(k)
        for one in (tuner, reference):
            with one.training(len(x)):
                (F.cross_entropy(one.model(x), y) + one.penalty()).backward()
            if one is reference:
                add_gradients(gradients, one)
            with one.responding(len(x)) as linearised:
                (F.cross_entropy(linearised(x), y) + one.penalty()).backward()
        add_gradients(gradients, reference)
        draw = dict(batch_size=len(x), seed=3, step=2 * k + 1, center=location)
        responses.append(method.space.sample(location, method.raw_scale.detach(), **draw).response)
    tuner.method.optimizer.step()
    assert tuner.trained == 1
    for name, parameter in reference.model.named_parameters():
        parameter.grad = gradients[name]
    method.shorten(method.optimizer, responses)
    for name, parameter in tuner.model.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.05 * gradients[name])


def add_gradients(sums, tuner):
    """Adds the gradients to sums, by name, and clears them."""
    for name, parameter in tuner.model.named_parameters():
        if parameter.grad is not None:
            sums[name] = sums.get(name, 0) + parameter.grad
            parameter.grad = None


def test_each_pass_gives_gradients_and_statistics_to_its_own_parameters_only():
    """Also where plain modules are left, and where a layer computes with its response at h = 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Dropout(0.3), nn.Linear(20, 3))
    tuned = respond(stn.convert(model, exclude="1", quiet=True))
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1), method="delta-stn")
    x, names = torch.randn(5, 2, 7), {name for name, _ in tuned.named_parameters()}
    response = {name for name in names if is_response(name)}
    for kind, own in (("training", names - response), ("responding", response)):
        before = tuned[1].running_mean.clone()
        with getattr(tuner, kind)(5) as given:
            ((given or tuned)(x).square().mean() + tuner.penalty()).backward()
        assert {name for name, parameter in tuned.named_parameters() if parameter.grad is not None} == own
        assert torch.equal(tuned[1].running_mean, before) == (kind == "responding")
        tuner.method.optimizer.zero_grad()


def test_passes_of_the_other_method_are_errors():
    stn_tuner, tuner = tuner_of(), delta()
    with pytest.raises(RuntimeError, match=r'only SelfTuner\(\.\.\., method="delta-stn"\) has passes of the response'):
        stn_tuner.responding(13).__enter__()
    with pytest.raises(RuntimeError, match="antithetic=True repeats the draw of the pass before"):
        tuner.responding(13, antithetic=True).__enter__()
    with tuner.responding(13) as linearised:
        linearised(batch(0)[0])
        tuner.penalty()
    with pytest.raises(ValueError, match="this pass of delta-stn is not perturbed: give antithetic=True to responding"):
        tuner.training(13, antithetic=True).__enter__()


class Cut(nn.Module):
    def forward(self, x):
        return torch.autograd.forward_ad.unpack_dual(x).primal


def test_what_cuts_tangents_is_an_error():
    message = r"no gradient to 1\.response_weight, although the loss depends on its layer"
    for step in (lambda tuner: tuner.train_step(batch(0)), lambda tuner: train(tuner, 0)):
        model = network()
        model[2] = nn.Sequential(Cut(), nn.ReLU())
        tuner = delta(model)
        with pytest.raises(RuntimeError, match=message):
            step(tuner)


def test_a_loop_without_passes_of_the_response_is_a_warning():
    tuner, (x, y) = tuner_of(method="delta-stn"), batch(0)
    with tuner.training(len(x)):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    with tuner.validating(len(x)):
        loss = F.cross_entropy(tuner.model(x), y)
    with pytest.warns(UserWarning, match=r"the response is trained by passes of `tuner.responding`, and there has"):
        tuner.hyper_step(loss)
