"""How gated layers start: as plain layers, whatever the hyperparameters, whose response learns at once."""

import math

import pytest
import torch
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.conversion.rules import RULES
from stn_fast.training.parameters import is_gate, is_response
from stn_fast.training.start import start_as_published

N = 4
MAKERS = {
    "linear": lambda **options: stn.HyperLinear(80, 120, num_hyperparameters=N, **options),
    "conv": lambda **options: stn.HyperConv2d(40, 60, 3, num_hyperparameters=N, groups=2, **options),
    "lstm": lambda **options: stn.HyperLSTM(30, 40, 2, num_hyperparameters=N, **options),
    "embedding": lambda **options: stn.HyperEmbedding(150, 100, padding_idx=3, num_hyperparameters=N, **options),
    "batch norm": lambda **options: stn.HyperBatchNorm2d(200, num_hyperparameters=N, **options),
}
INPUTS = {
    "linear": lambda: torch.randn(5, 80),
    "conv": lambda: torch.randn(5, 40, 6, 6),
    "lstm": lambda: torch.randn(3, 5, 30),
    "embedding": lambda: torch.randint(150, (5, 7)),
    "batch norm": lambda: torch.randn(5, 200, 2, 2),
}
BOUNDS = {"linear": 80**-0.5, "conv": (20 * 9) ** -0.5, "lstm": 40**-0.5, "embedding": 0.1}
each_layer = pytest.mark.parametrize("kind", MAKERS)
each_response = pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in MAKERS), *((kind, {"response_rank": 2}) for kind in BOUNDS)], ids=str
)


def made(kind, **options):
    torch.manual_seed(0)
    return MAKERS[kind](**options)


def outputs(layer, x, h):
    y = layer(x, h)
    return y[0] if isinstance(y, tuple) else y


@each_response
def test_a_new_layer_does_not_respond(kind, options):
    layer, x = made(kind, **options), INPUTS[kind]()
    assert torch.equal(outputs(layer, x, torch.randn(5, N)), outputs(layer, x, torch.zeros(5, N)))


@each_layer
def test_each_output_starts_with_a_gate_for_one_hyperparameter(kind):
    for name, parameter in made(kind).named_parameters():
        if is_gate(name):
            assert torch.equal(parameter, torch.eye(N)[torch.arange(len(parameter)) % N])


def test_a_layer_with_fewer_outputs_than_hyperparameters_has_a_gate_for_each():
    torch.manual_seed(0)
    layer = stn.HyperLinear(5, 99, num_hyperparameters=100)
    assert layer.weight_gate.all()
    assert layer.weight_gate.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("kind", BOUNDS)
def test_the_weights_and_the_projection_are_uniform_as_published(kind):
    for name, parameter in made(kind, response_rank=2).named_parameters():
        if name.startswith(("weight_hh", "weight_ih", "bias_hh", "bias_ih", "response_projection")) or name in (
            "weight",
            "bias",
        ):
            assert parameter.abs().max() <= BOUNDS[kind]
            assert parameter.std().item() == pytest.approx(BOUNDS[kind] / math.sqrt(3), rel=0.15)


def test_the_padding_row_of_an_embedding_is_zero():
    layer = made("embedding", response_rank=2)
    assert not layer.weight[3].any()
    assert not layer.response_projection[3].any()


@each_response
def test_the_response_learns_from_the_first_step(kind, options):
    layer, x = made(kind, **options), INPUTS[kind]()
    y = outputs(layer, x, torch.randn(5, N))
    (y * torch.randn_like(y)).sum().backward()
    norms = {name: parameter.grad.norm() for name, parameter in layer.named_parameters()}
    for name, norm in norms.items():
        if name.startswith("response_weight"):
            assert norm > 0.02 * norms[name.removeprefix("response_")]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("gates", [0.01, 0.0])
def test_the_published_start_draws_every_tensor_of_the_response(kind, gates):
    torch.manual_seed(0)
    layer = MAKERS[kind]()
    bound = BOUNDS.get(kind, 1.0)
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    start_as_published(torch.nn.Sequential(layer), 0, gates)
    for name, parameter in layer.named_parameters():
        if is_gate(name):
            assert parameter.std().item() == pytest.approx(gates, rel=0.1)
        elif name.startswith("response"):
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        else:
            assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", BOUNDS)
def test_entries_of_a_published_low_rank_response_have_the_variance_of_a_full_one(kind):
    torch.manual_seed(0)
    squares = []
    for seed in range(20):
        layer = MAKERS[kind](response_rank=2)
        start_as_published(layer, seed)
        if kind == "lstm":
            squares.append(layer._weights("hh", "l1").whole_response.detach().square().mean())
            continue
        a, b = layer.response_weight.detach().flatten(1), layer.response_projection.detach().flatten(1)
        products = b @ a.T if kind == "embedding" else a[: len(a) // layer.groups] @ b[:2]
        squares.append(products.square().mean())
        if kind == "embedding":
            assert not layer.response_projection[3].any()
    assert torch.stack(squares).mean().item() == pytest.approx(BOUNDS[kind] ** 2 / 3, rel=0.2)


def test_the_published_start_is_drawn_from_the_seed_in_the_same_order_in_every_release():
    layer, generator = made("linear"), torch.Generator().manual_seed(7 ^ 0x5EED)
    start_as_published(layer, 7)

    def uniform(*shape):
        return torch.empty(shape).uniform_(-BOUNDS["linear"], BOUNDS["linear"], generator=generator)

    assert torch.equal(layer.response_weight, uniform(120, 80))
    assert torch.equal(layer.weight_gate, torch.empty(120, N).normal_(std=0.01, generator=generator))
    assert torch.equal(layer.response_bias, uniform(120))
    assert torch.equal(layer.bias_gate, torch.empty(120, N).normal_(std=0.01, generator=generator))


CONVERTED = {
    "linear": lambda: nn.Linear(80, 120),
    "conv": lambda: nn.Conv2d(40, 60, 3, groups=2),
    "conv and relu": lambda: stn.ConvReLU2d(40, 60, 3, groups=2),
    "lstm": lambda: nn.LSTM(30, 40, 2),
    "lstm with drop connect": lambda: stn.DropConnectLSTM(30, 40, 2, p=0.0),
    "embedding": lambda: nn.Embedding(150, 100, padding_idx=3),
    "embedding with dropout": lambda: stn.EmbeddingWithDropout(150, 100, p=0.0, padding_idx=3),
    "batch norm": lambda: nn.BatchNorm2d(200),
}
SPACE = stn.HyperparameterSpace([stn.Hyperparameter(f"rate {k}", init=0.0) for k in range(N)])


def converted(kind, rank=None):
    torch.manual_seed(0)
    model = nn.Sequential(CONVERTED[kind]())
    return stn.convert(model, SPACE, of_loss=SPACE.names, response_rank=rank, quiet=True)


@pytest.mark.parametrize("gates", [0.01, 0.0])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", CONVERTED)
def test_the_published_start_of_a_converted_layer_is_that_of_the_gated_one(kind, rank, gates):
    gated_kind = next(name for name in MAKERS if kind.startswith(name))
    layer = MAKERS[gated_kind](**({} if gated_kind == "batch norm" else {"response_rank": rank}))
    model = converted(kind, rank)
    before = {name: parameter.clone() for name, parameter in model[0].named_parameters()}
    for one in (model, nn.Sequential(layer)):
        start_as_published(one, 5, gates)
    wanted = dict(layer.named_parameters())
    assert before.keys() == wanted.keys()
    for name, parameter in model[0].named_parameters():
        assert torch.equal(parameter, wanted[name] if is_response(name) else before[name]), name


@pytest.mark.parametrize("rank", [None, 2])
def test_a_converted_network_starts_as_published_as_the_gated_one_with_layers_in_the_same_order(rank):
    kinds = ("embedding", "lstm", "linear", "conv")
    model = nn.ModuleList(CONVERTED[kind]() for kind in kinds)
    stn.convert(model, SPACE, of_loss=SPACE.names, response_rank=rank, quiet=True)
    gated = nn.ModuleList(MAKERS[kind](response_rank=rank) for kind in kinds)
    for one in (model, gated):
        start_as_published(one, 5)
    wanted = dict(gated.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in model.named_parameters() if is_response(name))


OTHERS = {
    "layer norm": (lambda: nn.LayerNorm(300), {"": 1.0}),
    "conv1d": (lambda: nn.Conv1d(40, 60, 3), {"": 120**-0.5}),
    "attention": (
        lambda: nn.MultiheadAttention(36, 2, kdim=16, vdim=64),
        {"_q_proj": 36**-0.5, "_k_proj": 16**-0.5, "_v_proj": 64**-0.5},
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_converted_layers_start_with_responses_as_large_as_their_weights(kind):
    make, bounds = OTHERS[kind]
    torch.manual_seed(0)
    model = stn.convert(nn.Sequential(make()), SPACE, of_loss=SPACE.names, response_rank=None, quiet=True)
    start_as_published(model, 5, 0.01)
    for ending, bound in bounds.items():
        for name in (f"response_weight{ending}", f"response_bias{ending}"):
            response = getattr(model[0], name)
            assert 0.9 * bound < response.abs().max() <= bound
            assert response.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        for name in (f"weight_gate{ending}", f"bias_gate{ending}"):
            assert getattr(model[0], name).std().item() == pytest.approx(0.01, rel=0.2)


def test_layers_of_your_own_start_as_published_too():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(500))

    class TunedScale(Converted, Scale):
        pass

    def rule(module, context):
        context.add_response(module)
        context.become(module, TunedScale)

    RULES[Scale] = rule
    try:
        model = stn.convert(nn.Sequential(Scale()), SPACE, quiet=True)
    finally:
        del RULES[Scale]
    start_as_published(model, 5, 0.01)
    assert model[0].response_weight.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    assert model[0].weight_gate.std().item() == pytest.approx(0.01, rel=0.1)
