"""Responses of low rank in layers: their sizes, how they start, what they cost, how they fold and decay."""

import math

import pytest
import torch

import stn_fast as stn
from stn_fast.layers.gated import AUTO_OVERHEAD

N = 3
RANK = 4
MAKERS = {
    "linear": lambda **o: stn.HyperLinear(40, 60, num_hyperparameters=N, **o),
    "conv2d": lambda **o: stn.HyperConv2d(8, 12, 3, num_hyperparameters=N, **o),
    "grouped conv2d": lambda **o: stn.HyperConv2d(16, 24, 3, groups=2, num_hyperparameters=N, **o),
    "embedding": lambda **o: stn.HyperEmbedding(70, 30, num_hyperparameters=N, **o),
    "lstm": lambda **o: stn.HyperLSTM(20, 24, 2, num_hyperparameters=N, **o),
}
INPUTS = {
    "linear": lambda: torch.randn(5, 40),
    "conv2d": lambda: torch.randn(5, 8, 6, 6),
    "grouped conv2d": lambda: torch.randn(5, 16, 6, 6),
    "embedding": lambda: torch.randint(70, (5, 3)),
    "lstm": lambda: torch.randn(3, 5, 20),
}
each_layer = pytest.mark.parametrize("kind", list(MAKERS))
each_gated_layer = pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "lstm"])


def whole_response(layer):
    """R, of the shape of W, written out."""
    a, b = layer.response_weight.detach(), layer.response_projection.detach()
    if isinstance(layer, stn.HyperEmbedding):
        return b @ a.T
    groups = getattr(layer, "groups", 1)
    of_group = [a_g.flatten(1) @ b_g.flatten(1) for a_g, b_g in zip(a.chunk(groups), b.chunk(groups), strict=True)]
    return torch.cat(of_group).view(layer.weight.shape)


def in_double(inputs):
    """``inputs`` in float64, except for tokens."""
    return inputs.double() if inputs.is_floating_point() else inputs


def with_whole_response(kind, layer):
    """A layer with a full response that is the same function."""
    full = MAKERS[kind]().to(layer.weight.dtype)
    state = {name: value for name, value in layer.state_dict().items() if name != "response_projection"}
    full.load_state_dict(state | {"response_weight": whole_response(layer)})
    return full


@each_gated_layer
def test_a_layer_is_the_one_with_the_whole_response(kind):
    torch.manual_seed(0)
    layer, x, h = MAKERS[kind](response_rank=RANK).double(), in_double(INPUTS[kind]()), torch.randn(5, N).double()
    full = with_whole_response(kind, layer)
    torch.testing.assert_close(layer(x, h), full(x, h), rtol=1e-12, atol=1e-13)


@each_layer
def test_a_folded_layer_is_the_plain_one(kind):
    torch.manual_seed(0)
    layer, x, h = MAKERS[kind](response_rank=RANK).double(), in_double(INPUTS[kind]()), torch.randn(N).double()
    plain, ours = layer.fold(h)(x), layer(x, h.expand(5, N))
    for got, want in zip(plain, ours, strict=True) if kind == "lstm" else [(plain, ours)]:
        for one, other in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@each_gated_layer
def test_weight_decay_is_that_of_the_whole_response(kind):
    torch.manual_seed(0)
    layer, h, decay = MAKERS[kind](response_rank=RANK).double(), torch.randn(5, N).double(), torch.rand(5).double()
    full = with_whole_response(kind, layer)
    got, want = layer.weight_decay_penalty(h, decay), full.weight_decay_penalty(h, decay)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    names = ("weight", "weight_gate")
    gradients = [
        torch.autograd.grad(penalty, [getattr(of, name) for name in names])
        for penalty, of in ((got, layer), (want, full))
    ]
    for of_got, of_want in zip(*gradients, strict=True):
        torch.testing.assert_close(of_got, of_want, rtol=1e-11, atol=1e-13)


def test_the_decay_of_an_lstm_counts_every_matrix():
    torch.manual_seed(0)
    layer, h, decay = MAKERS["lstm"](response_rank=RANK).double(), torch.randn(5, N).double(), torch.rand(5).double()
    want = 0.0
    for _, side in layer._sides():
        own = side.weight + torch.einsum("bo,oi->boi", h @ side.weight_gate.T, side.whole_response)
        want = want + 0.5 * (decay * own.square().sum((1, 2))).mean()
    torch.testing.assert_close(layer.weight_decay_penalty(h, decay), want)


def test_auto_is_the_largest_rank_within_its_share_of_the_arithmetic():
    layer = stn.HyperLinear(650, 2600, num_hyperparameters=N, response_rank="auto")
    each, whole = 650 + 2600, 650 * 2600
    assert layer.response_rank * each <= AUTO_OVERHEAD * whole < (layer.response_rank + 1) * each
    assert stn.HyperLinear(20, 20, num_hyperparameters=N, response_rank="auto").response_rank == 1
    conv = stn.HyperConv2d(64, 192, 3, num_hyperparameters=N, response_rank="auto")
    assert conv.response_rank == math.floor(AUTO_OVERHEAD * 64 * 9 * 192 / (64 * 9 + 192))
    lstm = stn.HyperLSTM(650, 650, num_hyperparameters=N, response_rank="auto")
    assert lstm.response_projection_hh_l0.shape == (26, 650)


def test_a_layer_that_low_rank_would_not_make_cheaper_keeps_a_full_response():
    assert stn.HyperLinear(256, 10, num_hyperparameters=N, response_rank=9).response_rank == 9
    layer = stn.HyperLinear(256, 10, num_hyperparameters=N, response_rank=10)
    assert layer.response_rank is None
    assert layer.response_projection is None
    assert layer.response_weight.shape == (10, 256)
    depthwise = stn.HyperConv2d(16, 16, 3, groups=16, num_hyperparameters=N, response_rank=1)
    assert depthwise.response_rank is None


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "all", "16"])
@each_layer
def test_a_rank_that_is_none_is_refused_by_name(kind, rank):
    with pytest.raises(ValueError, match=r"Hyper\w+: response_rank must be an int >= 1.*'auto'"):
        MAKERS[kind](response_rank=rank)


def test_the_rank_is_shown():
    for make in MAKERS.values():
        assert "response_rank=4" in repr(make(response_rank=RANK))
        assert "response_rank" not in repr(make())
    assert "response_rank='auto'" in repr(MAKERS["lstm"](response_rank="auto"))


@each_layer
def test_a_plain_checkpoint_loads_and_a_full_response_is_refused(kind):
    layer, full = MAKERS[kind](response_rank=RANK), MAKERS[kind]()
    plain = {name: value for name, value in full.state_dict().items() if name.startswith(("weight", "bias"))}
    plain = {name: value for name, value in plain.items() if "gate" not in name}
    missing, unexpected = layer.load_state_dict(plain, strict=False)
    assert not unexpected
    assert all(name.startswith(("response", "weight_gate", "bias_gate")) for name in missing)
    with pytest.raises(RuntimeError, match="response_projection"):
        layer.load_state_dict(full.state_dict())


@each_gated_layer
def test_a_state_of_another_rank_is_refused_by_rank(kind):
    ranks = (None, 2, RANK)
    for here in ranks:
        for there in ranks:
            layer, state = MAKERS[kind](response_rank=here), MAKERS[kind](response_rank=there).state_dict()
            if here == there:
                layer.load_state_dict(state)
                continue
            with pytest.raises(RuntimeError, match=rf"has response_rank={here}, but a state of {there} is"):
                layer.load_state_dict(state)


def test_padding_rows_of_both_tables_start_and_stay_at_zero():
    layer = stn.HyperEmbedding(9, 20, padding_idx=2, num_hyperparameters=N, response_rank=2)
    assert not layer.weight[2].any()
    assert not layer.response_projection[2].any()
    layer(torch.tensor([[2, 3]]), torch.randn(1, N)).sum().backward()
    assert not layer.weight.grad[2].any()
    assert not layer.response_projection.grad[2].any()
    assert layer.response_projection.grad[3].any()


def test_sparse_gradients_of_a_table_of_low_rank_have_the_rows_that_were_looked_up():
    layer = stn.HyperEmbedding(9, 20, sparse=True, num_hyperparameters=N, response_rank=2)
    layer(torch.tensor([[4, 3]]), torch.randn(1, N)).sum().backward()
    for gradient in (layer.weight.grad, layer.response_projection.grad):
        assert gradient.is_sparse
        assert sorted(gradient.coalesce().indices()[0].tolist()) == [3, 4]


def test_drop_connect_masks_the_weights_and_leaves_the_factors():
    space = stn.HyperparameterSpace([stn.Hyperparameter("drop", low=0.0, high=0.9, init=0.5, per_example=False)])
    options = dict(num_hyperparameters=1, recurrent_dropout="drop", stream=1)
    layer = stn.HyperLSTM(20, 24, response_rank=RANK, **options)
    hyper = space.at(space.initial_state()[0], batch_size=2)
    dropped, plain = layer._connected("l0", hyper), layer._weights("hh", "l0")
    assert 0.3 < (dropped.weight == 0).float().mean() < 0.7
    assert dropped.response_weight is plain.response_weight
    assert dropped.response_projection is plain.response_projection


def test_one_row_for_all_examples_needs_no_gradient_of_the_weights():
    """A validation step at unperturbed hyperparameters: folding would multiply by the whole batch for the weights'."""
    from flops import flops_of

    layer, h = stn.HyperLinear(200, 300, num_hyperparameters=N, response_rank=2), torch.zeros(N, requires_grad=True)
    layer.requires_grad_(False)
    x = torch.randn(64, 200, requires_grad=True)

    def step():
        layer(x, h).sum().backward()

    assert flops_of(step) < 2 * 1.1 * (2 * 64 * 200 * 300)
