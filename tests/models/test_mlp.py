"""The MLP is the plain one that it says it is, and trains as one that is written with gated layers."""

import pytest
import torch
from numerics import relative_error
from random_response import respond
from torch import nn

import stn_fast as stn
from stn_fast.models import mlp, plain_mlp, tuned
from stn_fast.training.methods import SelfTuning, check_streams
from stn_fast.training.task import classification_loss, decayed_classification_loss, outputs

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("input_dropout", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("hidden_dropout_2", low=0.0, high=0.9, init=0.3),
        stn.Hyperparameter("input_noise", low=0.0, init=0.3),
        stn.Hyperparameter("weight_decay", low=0.0, init=1e-3),
    ]
)
DECAY = stn.HyperparameterSpace([one for one in SPACE if one.name == "weight_decay"])


def model_of(space=SPACE, sizes=(64, 256, 256, 10), rank=None):
    torch.manual_seed(0)
    return respond(tuned(plain_mlp(sizes), space, rank))


def regularisers(model):
    kinds = stn.PerExampleDropout | stn.PerExampleNoise
    return {module.name: module for module in model.modules() if isinstance(module, kinds)}


def sampled(batch, space=SPACE):
    return space.sample(*space.initial_state(), batch_size=batch, seed=0, step=0)


def test_regularisers_are_those_the_space_names_and_draw_from_streams_of_their_own():
    full = model_of()
    check_streams(full)
    assert regularisers(full).keys() == set(SPACE.names) - {"weight_decay"}
    bare = model_of(DECAY)
    assert not regularisers(bare)
    plain = [module for module in bare if isinstance(module, stn.GaussianNoise | nn.Dropout)]
    assert [getattr(module, "std", getattr(module, "p", None)) for module in plain] == [0.0] * 4


@pytest.mark.parametrize("name", [name for name in SPACE.names if name != "weight_decay"])
def test_a_regulariser_draws_the_same_numbers_whatever_others_are_tuned(name):
    alone = model_of(stn.HyperparameterSpace([SPACE[name]]))
    assert regularisers(alone)[name].stream == regularisers(model_of())[name].stream


def test_shared_names_are_the_rates_of_all_places_without_a_name_of_their_own():
    rates = [stn.Hyperparameter(name, low=0.0, high=0.9, init=0.3) for name in ("hidden_dropout_1", "hidden_dropout")]
    model = model_of(stn.HyperparameterSpace(rates), (4, 5, 5, 5, 3))
    names = [model.get_submodule(f"hidden_dropout_{place}").name for place in (1, 2, 3)]
    assert names == ["hidden_dropout_1", "hidden_dropout", "hidden_dropout"]


@pytest.mark.parametrize("training", [True, False])
def test_it_is_a_plain_mlp_before_and_after_it_is_tuned_at_its_initial_hyperparameters(training):
    torch.manual_seed(0)
    model, x = plain_mlp((8, 16, 4)).train(training), torch.randn(5, 8)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for linear, own in zip((plain[0], plain[2]), (model.linear_1, model.linear_2), strict=True):
        linear.weight, linear.bias = own.weight, own.bias
    assert torch.equal(model(x), plain(x))
    respond(tuned(model, DECAY))
    location, _ = DECAY.initial_state()
    assert torch.allclose(outputs(model, DECAY.at(location, batch_size=5), x), plain(x), atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_every_example_has_the_plain_network_of_its_own_hyperparameters(rank):
    model, x, hyper = model_of(sizes=(8, 16, 16, 4), rank=rank).double().eval(), torch.randn(5, 8).double(), sampled(5)
    assert model.linear_2.response_rank == rank
    y, own = outputs(model, hyper, x), model.tuned_hyperparameters
    for b in range(5):
        own.location.copy_(SPACE.initial_state()[0] + hyper.response[b])
        folded = stn.fold(model)
        assert type(folded.linear_1) is nn.Linear
        assert relative_error(folded(x[b]), y[b]) < 1e-6  # the location is rounded to float32
    assert relative_error(y, stn.fold(model)(x)) > 1e-3


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("names", [SPACE.names, ("hidden_dropout_2", "weight_decay")], ids=len)
def test_it_trains_as_a_network_of_gated_layers(names, rank):
    space = stn.HyperparameterSpace([SPACE[name] for name in names])
    model, gated = model_of(space, (8, 16, 16, 4), rank), mlp(space, (8, 16, 16, 4), response_rank=rank)
    for number, layer in enumerate(gated.layers, start=1):
        layer.load_state_dict(model.get_submodule(f"linear_{number}").state_dict())
    x, found = torch.randn(6, 8), []
    for one in (model, gated):
        y = outputs(one, sampled(6, space), x)
        y.square().sum().backward()
        layers = one.layers if one is gated else [one.linear_1, one.linear_2, one.linear_3]
        found.append([y, *(parameter.grad for layer in layers for _, parameter in sorted(layer.named_parameters()))])
    assert len(found[0]) == 1 + 3 * (6 + (rank is not None))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("k", range(5))
def test_every_hyperparameter_gets_a_validation_gradient(k):
    model = model_of().eval().requires_grad_(False)
    location, raw_scale = (t.requires_grad_() for t in SPACE.initial_state())
    hyper = SPACE.sample(location, raw_scale, batch_size=20, seed=0, step=0)
    outputs(model, hyper, torch.randn(20, 64)).square().mean().backward()
    assert location.grad[k] != 0
    assert raw_scale.grad[k] != 0


def test_a_hyperparameter_that_nothing_uses_is_refused_at_the_first_step():
    method = SelfTuning(model_of(sizes=(8, 16, 4)), SPACE, decayed_classification_loss, classification_loss)
    with pytest.raises(ValueError, match=r"nothing uses 'hidden_dropout_2':"):
        method.train_step((torch.randn(5, 8), torch.arange(5) % 4), 0)


def test_too_few_sizes_are_refused():
    with pytest.raises(ValueError, match=r"sizes must have at least two.*got \(5,\)"):
        plain_mlp((5,))


def test_something_else_than_a_space_is_refused():
    with pytest.raises(TypeError, match="space must be a HyperparameterSpace, got list"):
        tuned(plain_mlp((3, 2)), list(SPACE))
