"""Steps leave the modes of a model's modules as they were, and a frozen batch norm frozen."""

import pytest
import torch
from gates_alone import FixedHyperparameters, SelfTuning
from torch import nn

import stn_fast as stn
from stn_fast.training.task import classification_loss

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])
BATCH = torch.randn(32, 10) + 5, torch.randint(0, 3, (32,))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8))
        self.norm = nn.BatchNorm1d(8)
        self.head = stn.HyperLinear(8, 3, num_hyperparameters=1)

    def forward(self, x, hyper):
        return self.head(self.norm(self.backbone(x)), hyper)


def methods(network):
    yield SelfTuning(network(), SPACE, classification_loss, classification_loss)
    yield FixedHyperparameters(network(), SPACE, classification_loss)


def frozen():
    network = Network().train()
    network.backbone.eval()
    return network


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


def steps(method, count=2):
    for step in range(count):
        method.train_step(BATCH, 2 * step)
        if method.tunes:
            method.valid_step(BATCH, 2 * step + 1)


def test_steps_keep_the_modes_and_a_frozen_norms_statistics():
    for method in methods(frozen):
        before = modes(method.model)
        still, moved = method.model.backbone[1].running_mean.clone(), method.model.norm.running_mean.clone()
        steps(method)
        assert modes(method.model) == before
        assert torch.equal(method.model.backbone[1].running_mean, still)
        assert not torch.equal(method.model.norm.running_mean, moved)


def test_an_evaluation_between_two_steps_unfreezes_nothing():
    for method in methods(frozen):
        before = modes(method.model)
        steps(method)
        still = method.model.backbone[1].running_mean.clone()
        method.model.eval()
        steps(method)
        assert modes(method.model) == before
        assert torch.equal(method.model.backbone[1].running_mean, still)


def test_modules_frozen_or_unfrozen_later_keep_their_new_modes():
    for method in methods(frozen):
        steps(method)
        method.model.backbone.train()
        method.model.norm.eval()
        before = modes(method.model)
        steps(method)
        method.model.eval()
        steps(method)
        assert modes(method.model) == before


def test_a_model_that_was_never_in_training_mode_is_trained_in_it_as_a_whole():
    for method in methods(lambda: Network().eval()):
        steps(method)
        assert all(modes(method.model).values())


def test_a_module_added_later_is_trained():
    for method in methods(frozen):
        method.model.extra = nn.Dropout()
        method.model.eval()
        steps(method)
        assert method.model.extra.training
        assert not method.model.backbone.training


@pytest.mark.parametrize("training", [True, False])
def test_a_validation_step_puts_every_mode_back_and_so_does_one_that_fails(training):
    method = next(methods(frozen))
    method.model.train(training)
    method.model.norm.train(not training)
    before = modes(method.model)
    seen = []
    method.validation_objective = lambda *given: seen.append(modes(given[0])) or classification_loss(*given)
    method.valid_step(BATCH, 0)
    assert not any(seen[0].values())
    assert modes(method.model) == before

    def fail(*given):
        raise ZeroDivisionError

    method.validation_objective = fail
    with pytest.raises(ZeroDivisionError):
        method.valid_step(BATCH, 1)
    assert modes(method.model) == before
    assert all(parameter.requires_grad for parameter in method.model.parameters())
