"""A task may have a converted network: every method trains it as it trains the same network of gated layers."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import stn_fast as stn
from stn_fast.data import DataSet, Split
from stn_fast.training import task
from stn_fast.training.build import build_method
from stn_fast.training.config import Config, HyperparameterConfig, MethodConfig, OptimizerConfig, ScheduleConfig
from stn_fast.training.run import run
from stn_fast.training.spaces import build_space

METHODS = ("stn", "delta-stn", "fixed", "one-pass")


def config_of(method, **options):
    average = options.pop("average", 0.0)
    return Config(
        recipe="own",
        hyperparameters={
            "dropout": HyperparameterConfig(init=0.3, low=0.0, high=0.9),
            "weight_decay": HyperparameterConfig(init=1e-2, low=0.0),
        },
        method=MethodConfig(name=method, warmup_epochs=0, **options),
        optimizer=OptimizerConfig(average=average),
        schedule=ScheduleConfig(epochs=2, batch_size=10, valid_batch_size=10),
        threads=1,
    )


class Gated(nn.Module):
    def __init__(self, n, rank=None):
        super().__init__()
        self.first, self.last = (
            stn.HyperLinear(*sizes, num_hyperparameters=n, response_rank=rank) for sizes in ((6, 9), (9, 3))
        )
        self.dropout = stn.PerExampleDropout("dropout", stream=1)

    def forward(self, x, hyper):
        return self.last(self.dropout(self.first(x, hyper).relu(), hyper), hyper)


def networks(space, rank=None):
    """The network of gated layers, and the same one plain and converted, with random responses."""
    torch.manual_seed(0)
    gated = Gated(len(space), rank)
    for name, parameter in gated.named_parameters():
        if "response" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = OrderedDict(first=nn.Linear(6, 9), relu=nn.ReLU(), dropout=nn.Dropout(), last=nn.Linear(9, 3))
    converted = stn.convert(nn.Sequential(layers), space, response_rank=rank, quiet=True)
    converted.load_state_dict(gated.state_dict(), strict=False)
    return gated, converted


def data():
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, :3].sum(1) > 0).long()
    return DataSet(*(Split(x[rows], y[rows]) for rows in (slice(40), slice(40, 70), slice(70, 90))))


def task_of(space, model):
    return task.Task(
        space, model, data(), task.decayed_classification_loss, task.classification_loss, task.classification_scores
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_network_is_trained_as_one_of_gated_layers(method):
    config = config_of(method)
    space, losses = build_space(config), []
    for model in networks(space):
        built, own = build_method(config, task_of(space, model)), data()
        steps = [built.train_step(own.train, step) for step in range(3)]
        steps += [built.valid_step(own.valid, 3)] if built.tunes else []
        steps += [built.train_step(own.train, 4)]
        losses.append((torch.stack(steps), built.location.detach().clone()))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert losses[0][0][0] != losses[0][0][-1]


def test_the_network_has_the_tuned_hyperparameters():
    """So that it is called as the plain one, and can be folded."""
    config = config_of("stn")
    space = build_space(config)
    _, model = networks(space)
    built = build_method(config, task_of(space, model))
    before = model.tuned_hyperparameters.values()
    built.train_step(data().train, 0)
    built.valid_step(data().valid, 1)
    assert model.tuned_hyperparameters.values() == space.values(built.location) != before


@pytest.mark.parametrize(("method", "average"), [("stn", 0.0), ("delta-stn", 0.9)])
def test_a_run_of_a_converted_network_can_be_loaded_and_folded(tmp_path, method, average):
    config = replace(config_of(method, average=average), run_dir=str(tmp_path))

    def build(config):
        space = build_space(config)
        return task_of(space, networks(space)[1])

    found = run(config, build)
    trained = stn.load(tmp_path, build(config).model)
    assert trained.values() == pytest.approx(found["hyperparameters"])
    assert torch.equal(trained.model.tuned_hyperparameters.raw_scale, trained.method.raw_scale)
    x, y = data().test
    logits = trained.model(x)
    assert nn.functional.cross_entropy(logits, y).item() == pytest.approx(found["test_loss"], rel=1e-5)
    torch.testing.assert_close(stn.fold(trained.model)(x), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "deviation"), [("stn", 0.01), ("delta-stn", 0.0)])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_published_start_of_the_response_is_that_of_gated_layers(method, deviation, rank):
    config = config_of(method, response_start="published")
    space = build_space(config)
    gated, converted = networks(space, rank)
    for model in (gated, converted):
        build_method(config, task_of(space, model))
    ours, theirs = (dict(model.named_parameters()) for model in (converted, gated))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    gates = torch.cat([parameter.flatten() for name, parameter in ours.items() if "gate" in name])
    assert gates.std().item() == pytest.approx(deviation, rel=0.3)
    assert ours["first.response_weight"].any()
