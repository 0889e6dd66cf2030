"""The plain modules that torch lacks: their formulas, and what they become when they are converted."""

import copy
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from random_response import respond
from torch import nn
from torch.autograd import forward_ad

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.training.parameters import is_gate

EXAMPLES, WORDS = 4, 11


class Kind(NamedTuple):
    """A module with strength p, the shape of its input, and the dimension of that which counts examples."""

    make: Callable[[float], nn.Module]
    shape: tuple[int, ...]
    dim: int = 0


KINDS = {
    "noise": Kind(lambda p: stn.GaussianNoise(p), (4, 3, 6)),
    "noise, time first": Kind(lambda p: stn.GaussianNoise(p), (3, 4, 6), 1),
    "locked": Kind(lambda p: stn.LockedDropout(p, dim=1), (4, 5, 9)),
    "locked, time first": Kind(lambda p: stn.LockedDropout(p), (5, 4, 9), 1),
    "words": Kind(lambda p: stn.EmbeddingWithDropout(WORDS, 6, p=p, padding_idx=2), (4, 5)),
    "words, time first": Kind(lambda p: stn.EmbeddingWithDropout(WORDS, 6, p=p), (5, 4), 1),
    "lstm": Kind(
        lambda p: stn.DropConnectLSTM(6, 5, 2, p=p, bias=False, batch_first=True, bidirectional=True), (4, 3, 6)
    ),
    "lstm, time first": Kind(lambda p: stn.DropConnectLSTM(6, 5, p=p), (3, 4, 6), 1),
    "conv": Kind(lambda p: stn.ConvReLU2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 4, 7, 7)),
}
WITH_RATE = [kind for kind in KINDS if kind != "conv"]
WITH_WEIGHTS = [kind for kind in KINDS if kind.startswith(("words", "lstm", "conv"))]
SHARED = [kind for kind in KINDS if kind.startswith(("words", "lstm"))]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_rank = pytest.mark.parametrize("rank", [None, 2])


def space_of(kind):
    """The strength as `rate`, and one that only the loss uses."""
    rate = dict(high=None if "noise" in kind else 0.9, per_example=kind not in SHARED)
    used = [stn.Hyperparameter("rate", low=0.0, init=0.4, **rate)] if kind in WITH_RATE else []
    return stn.HyperparameterSpace([*used, stn.Hyperparameter("other", init=0.0)])


def plain_of(kind, p=0.3):
    torch.manual_seed(0)
    return KINDS[kind].make(p).double()


def converted(kind, rank=None, **options):
    """The layer of a converted model whose first stream is 2, with a random response and random gates."""
    model, space = nn.ModuleDict({"first": nn.Dropout(), "layer": plain_of(kind)}), space_of(kind)
    given = dict(dropouts={"layer": "rate"} if kind in WITH_RATE else {}, example_dims={"layer": KINDS[kind].dim})
    stn.convert(model, space, of_loss=["other"], response_rank=rank, quiet=True, **given | options)
    respond(model)
    for name, parameter in model.named_parameters():
        if is_gate(name):
            nn.init.normal_(parameter)
    if getattr(model["layer"], "padding_idx", None) is not None:
        with torch.no_grad():
            model["layer"]._response_table[model["layer"].padding_idx].zero_()
    return model["layer"]


def inputs(kind, shape=None):
    generator, shape = torch.Generator().manual_seed(1), shape or KINDS[kind].shape
    if "words" in kind:
        return torch.randint(WORDS, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sampled(layer, examples=EXAMPLES, **options):
    own = layer.tuned
    options = dict(seed=3, step=2, first_example=5) | options
    return own.space.sample(own.location, own.raw_scale, batch_size=examples, **options)


def leaves(outputs):
    """(y, (h, c)) as three tensors."""
    return outputs[0], *outputs[1]


def called(layer, hyper, x):
    """The output of a converted layer, without the state."""
    with layer.tuned.using(hyper):
        y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def repeated(module, x):
    """What a plain module returns from the same random numbers at every call."""
    torch.manual_seed(7)
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


# The plain modules.


def test_noise_has_the_standard_deviation_in_training_only():
    noise, x = stn.GaussianNoise(0.3), torch.randn(200, 300)
    y = repeated(noise, x)
    torch.manual_seed(7)
    assert torch.equal(y, x + 0.3 * torch.randn(200, 300))
    assert (y - x).std().item() == pytest.approx(0.3, rel=0.02)
    assert not torch.equal(noise(x), noise(x))
    assert noise.eval()(x) is x
    assert stn.GaussianNoise(0.0)(x) is x


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_locked_dropout_has_one_mask_along_a_dimension_in_training_only(dim):
    dropout, x = stn.LockedDropout(0.3, dim=dim), torch.rand(30, 40, 50) + 1
    y = dropout(x)
    kept = y != 0
    along = kept.movedim(dim, 0)
    assert torch.equal(along, along[:1].expand_as(along))
    assert along[0].any(0).all()
    assert along[0].any(1).all()
    assert along[0].float().mean().item() == pytest.approx(0.7, abs=0.05)
    torch.testing.assert_close(y, x * kept / 0.7)
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x
    assert stn.LockedDropout(0.0)(x) is x


def test_words_are_dropped_wherever_they_are_and_others_scaled_in_training_only():
    embedding, tokens = stn.EmbeddingWithDropout(100, 6, p=0.3), torch.randint(100, (50, 40))
    rows = F.embedding(tokens, embedding.weight)
    y = embedding(tokens)
    dropped = (y == 0).all(-1)
    assert all(dropped[tokens == word].unique().numel() == 1 for word in tokens.unique())
    assert 0.15 < torch.stack([dropped[tokens == word][0] for word in tokens.unique()]).float().mean() < 0.45
    torch.testing.assert_close(y, rows * ~dropped[..., None] / 0.7)
    assert not torch.equal(embedding(tokens), y)
    assert torch.equal(embedding.eval()(tokens), rows)
    embedding.p = 0.0
    assert torch.equal(embedding.train()(tokens), rows)


def test_a_table_with_dropout_starts_uniformly_and_its_padding_at_0():
    table = stn.EmbeddingWithDropout(500, 80, padding_idx=3).weight
    assert not table[3].any()
    assert 0.099 < table.abs().max() <= 0.1
    assert table.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


LSTMS = [dict(), dict(num_layers=2, bias=False), dict(num_layers=2, bidirectional=True, batch_first=True)]


@pytest.mark.parametrize("options", LSTMS, ids=str)
def test_only_the_hidden_to_hidden_weights_are_dropped_once_for_a_call_in_training_only(options):
    lstm, torchs, x = stn.DropConnectLSTM(6, 5, p=0.4, **options), nn.LSTM(6, 5, **options), torch.randn(7, 4, 6)
    torchs.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm.eval()(x)[0], torchs(x)[0])
    y = repeated(lstm.train(), x)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in torchs.named_parameters():
            if "weight_hh" in name:
                weight.copy_(F.dropout(weight, 0.4))
                assert 0.2 < (weight == 0).float().mean() < 0.6
    assert torch.equal(y, torchs(x)[0])
    assert not torch.equal(lstm(x)[0], y)
    torchs.load_state_dict(lstm.state_dict())  # its own weights have not changed
    assert torch.equal(lstm.eval()(x)[0], torchs(x)[0])
    lstm.p = 0.0
    assert torch.equal(lstm.train()(x)[0], torchs(x)[0])


def test_gradients_reach_the_weights_that_were_kept():
    lstm = stn.DropConnectLSTM(6, 5, p=0.4)
    repeated(lstm, torch.randn(7, 4, 6)).sum().backward()
    torch.manual_seed(7)
    kept = F.dropout(torch.ones(20, 5), 0.4) != 0
    assert torch.equal(lstm.weight_hh_l0.grad != 0, kept)
    assert lstm.weight_ih_l0.grad.all()


def test_a_call_that_fails_leaves_the_weights():
    lstm, x = stn.DropConnectLSTM(6, 5, p=0.4), torch.randn(7, 4, 6)
    want = lstm.eval()(x)[0]
    with pytest.raises(RuntimeError):
        lstm.train()(torch.randn(7, 4, 3))
    assert torch.equal(lstm.eval()(x)[0], want)


@pytest.mark.parametrize("options", LSTMS, ids=str)
def test_an_lstm_starts_as_the_gated_one_from_the_same_seed(options):
    started = []
    for made in (stn.DropConnectLSTM, lambda *sizes, **given: stn.HyperLSTM(*sizes, num_hyperparameters=2, **given)):
        torch.manual_seed(0)
        started.append(dict(made(6, 5, **options).named_parameters()))
    assert all(torch.equal(parameter, started[1][name]) for name, parameter in started[0].items())


@pytest.mark.parametrize("options", [dict(), dict(stride=2, padding=1, padding_mode="reflect", groups=2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_with_relu_is_torchs_and_relu(options, training):
    conv, torchs, x = stn.ConvReLU2d(4, 6, 3, **options), nn.Conv2d(4, 6, 3, **options), torch.randn(2, 4, 7, 7)
    torchs.load_state_dict(conv.state_dict())
    y = conv.train(training)(x)
    assert torch.equal(y, torchs(x).relu())
    assert (y == 0).any()


@pytest.mark.parametrize(
    ("make", "torchs"),
    [
        (lambda: stn.EmbeddingWithDropout(9, 6), nn.Embedding(9, 6)),
        (lambda: stn.DropConnectLSTM(6, 5, 2), nn.LSTM(6, 5, 2)),
        (lambda: stn.ConvReLU2d(4, 6, 3), nn.Conv2d(4, 6, 3)),
        (lambda: stn.GaussianNoise(), nn.Dropout()),
        (lambda: stn.LockedDropout(), nn.Dropout()),
    ],
)
def test_the_state_of_torchs_module_loads(make, torchs):
    module = make()
    module.load_state_dict(torchs.state_dict())
    assert all(map(torch.equal, module.parameters(), torchs.parameters()))
    assert isinstance(torchs, nn.Dropout) or isinstance(module, type(torchs))


def test_strengths_are_shown():
    modules = nn.ModuleList(KINDS[kind].make(0.25) for kind in ("noise", "locked", "words", "lstm"))
    shown = repr(modules)
    for text in (
        "GaussianNoise(std=0.25)",
        "LockedDropout(p=0.25, dim=1)",
        "padding_idx=2, p=0.25)",
        "bidirectional=True, p=0.25)",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: stn.GaussianNoise(-0.1), ValueError, r"GaussianNoise: std must be >= 0, got -0\.1"),
        (lambda: stn.GaussianNoise("much"), ValueError, r"GaussianNoise: std must be a finite number, got 'much'"),
        (lambda: stn.GaussianNoise(math.nan), ValueError, r"GaussianNoise: std must be .*nan"),
        (lambda: stn.LockedDropout(1.0), ValueError, r"LockedDropout: p must be at least 0 and below 1, got 1\.0"),
        (lambda: stn.LockedDropout(dim=-1), ValueError, r"LockedDropout: dim must be an int >= 0.*-1"),
        (lambda: stn.LockedDropout(dim=0.5), ValueError, r"LockedDropout: dim must be an int >= 0.*0\.5"),
        (lambda: stn.EmbeddingWithDropout(5, 3, p=-0.1), ValueError, r"EmbeddingWithDropout: p must be at .*-0\.1"),
        (lambda: stn.EmbeddingWithDropout(5, 3, p=None), ValueError, r"EmbeddingWithDropout: p must be a .*None"),
        (lambda: stn.DropConnectLSTM(5, 3, p=1.5), ValueError, r"DropConnectLSTM: p must be at least 0.*1\.5"),
        (lambda: stn.DropConnectLSTM(5, 3, dropout=0.1), TypeError, r"DropConnectLSTM has no dropout: .*LockedDropout"),
        (lambda: stn.DropConnectLSTM(5, 3, proj_size=2), TypeError, r"DropConnectLSTM has no proj_size: .*nn\.LSTM"),
    ],
)
def test_wrong_arguments_are_named(make, error, says):
    with pytest.raises(error, match=says):
        make()


# The spaces that they suggest.


class Body(nn.Module):
    """Words and an LSTM, whose last output is regularised; called with tokens (B, T)."""

    def __init__(self, p=0.2, std=0.4):
        super().__init__()
        self.words = stn.EmbeddingWithDropout(WORDS, 6, p=p)
        self.locked = stn.LockedDropout(p, dim=1)
        self.lstm = stn.DropConnectLSTM(6, 5, p=p, batch_first=True)
        self.noise = stn.GaussianNoise(std)

    def forward(self, tokens):
        return self.noise(self.lstm(self.locked(self.words(tokens)))[0][:, -1])


def network(**strengths):
    return nn.Sequential(Body(**strengths), nn.Linear(5, 3))


def suggested(model, group):
    return {one.name: (one.high, one.init, one.per_example) for one in stn.suggest_space(model, group)}


def test_noise_has_no_upper_bound_and_shared_rates_do_not_differ_between_examples():
    assert suggested(network(), "type") == {
        "words_dropout": (0.95, 0.2, False),
        "locked": (0.95, 0.2, True),
        "lstm_dropout": (0.95, 0.2, False),
        "noise": (None, 0.4, True),
        "weight_decay": (None, 1e-4, True),
    }
    assert {one.low for one in stn.suggest_space(network())} == {0.0}


def test_each_module_may_have_a_strength_of_its_own():
    names = ["0_words_dropout", "0_locked", "0_lstm_dropout", "0_noise", "weight_decay"]
    assert list(suggested(network(), "each")) == names


def test_a_block_has_one_rate_for_examples_one_that_they_share_and_one_noise():
    model = nn.ModuleDict({"body": Body(p=0.2), "head": nn.Sequential(nn.Dropout(0.3), stn.GaussianNoise(0.0))})
    assert suggested(model, "block") == {
        "body_shared_dropout": (0.95, 0.2, False),
        "body_dropout": (0.95, 0.2, True),
        "body_noise": (None, 0.4, True),
        "head_dropout": (0.95, 0.3, True),
        "head_noise": (None, 0.05, True),
        "weight_decay": (None, 1e-4, True),
    }
    tuned = stn.convert(nn.ModuleDict({**model, "linear": nn.Linear(2, 2)}), group="block", quiet=True)
    names = [tuned["body"].get_submodule(name).name for name in ("words", "locked", "lstm")]
    assert names == ["body_shared_dropout", "body_dropout", "body_shared_dropout"]
    assert (tuned["body"].noise.name, tuned["head"][1].name) == ("body_noise", "head_noise")


def test_modules_in_containers_have_the_names_of_their_classes():
    model = nn.Sequential(*(KINDS[kind].make(0.3) for kind in ("noise", "locked", "words", "lstm")))
    names = ["gaussiannoise", "lockeddropout", "embeddingwithdropout_dropout", "dropconnectlstm_dropout"]
    assert list(suggested(model, "type")) == [*names, "weight_decay"]


def test_a_large_strength_is_a_start_within_the_bounds():
    assert suggested(nn.Sequential(stn.GaussianNoise(7.0)), "type")["gaussiannoise"] == (None, 7.0, True)
    assert suggested(nn.Sequential(stn.LockedDropout(0.99)), "type")["lockeddropout"] == (0.95, 0.9, True)


# Converted.


@each_kind
@each_rank
@pytest.mark.parametrize("training", [True, False])
def test_with_zero_gates_it_is_the_plain_module_where_nothing_is_dropped(kind, rank, training):
    layer, x = converted(kind, rank).train(training), inputs(kind)
    want = repeated(plain_of(kind, 0.0), x)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if is_gate(name):
                parameter.zero_()
        if training:
            layer.tuned.location[0] = -200  # at which the strength is 0 also in float32
    hyper = sampled(layer)
    assert kind not in WITH_RATE or hyper["rate"].any() != training
    assert relative_error(called(layer, hyper, x), want) < 1e-14
    if not training:
        y = layer(x)
        assert relative_error(y[0] if isinstance(y, tuple) else y, want) < 1e-14


def gated_layer(kind, layer, rank):
    """The layer of this package with the same parameters and streams, and how it is called with (x, hyper)."""
    gated: dict[str, Any] = dict(num_hyperparameters=len(space_of(kind)), response_rank=rank, dtype=torch.float64)
    dim = KINDS[kind].dim
    if "noise" in kind:
        noise = stn.PerExampleNoise("rate", stream=2)
        return noise, lambda x, hyper: noise(x, hyper, example_dim=dim)
    if "locked" in kind:
        dropout = stn.PerExampleDropout("rate", stream=2, shared_dims=(layer.dim,))
        return dropout, lambda x, hyper: dropout(x, hyper, example_dim=dim)
    if "words" in kind:
        table = stn.HyperEmbedding(WORDS, 6, layer.padding_idx, **gated)
        words = stn.EmbeddingDropout("rate", stream=2)
        return table, lambda x, hyper: words.train(table.training)(table, x, hyper, example_dim=dim)
    if "lstm" in kind:
        given = dict(bias=layer.bias, batch_first=layer.batch_first, bidirectional=layer.bidirectional)
        # It counts these streams after those of dropout between its layers.
        stream = 3 - layer.num_layers
        lstm = stn.HyperLSTM(6, 5, layer.num_layers, recurrent_dropout="rate", stream=stream, **given, **gated)
        return lstm, lambda x, hyper: lstm(x, hyper)[0]
    conv = stn.HyperConv2d(4, 6, 3, stride=2, padding=1, groups=2, relu=True, **gated)
    return conv, conv


HYPERS = {
    "perturbed": sampled,
    "antithetic": lambda layer: sampled(layer, antithetic=True),
    "unperturbed": lambda layer: layer.tuned.space.at(layer.tuned.location + 0.7, batch_size=EXAMPLES, seed=3, step=2),
    "centred": lambda layer: layer.tuned.space.at(layer.tuned.location, batch_size=EXAMPLES, step=2, centred=True),
}


@each_kind
@each_rank
@pytest.mark.parametrize("batch", HYPERS)
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_the_gated_layer_of_its_kind_does(kind, rank, batch, training):
    """Output and gradients, with the same parameters and streams."""
    layer, found = converted(kind, rank).train(training), []
    gated, call = gated_layer(kind, layer, rank)
    gated.load_state_dict(layer.state_dict())
    for module, of in ((layer, lambda x, hyper: called(layer, hyper, x)), (gated.train(training), call)):
        x = inputs(kind)
        x = x.requires_grad_(x.is_floating_point())
        y = of(x, HYPERS[batch](layer))
        leaves = [parameter for _, parameter in sorted(module.named_parameters())] + [x] * x.requires_grad
        slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append((y, *torch.autograd.grad(y, leaves, slopes, allow_unused=True)))
    assert len(found[0]) == len(found[1]) > 1
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
@each_rank
def test_it_has_the_tangent_of_the_gated_layer(kind, rank):
    layer, x, found = converted(kind, rank), inputs(kind), []
    gated, call = gated_layer(kind, layer, rank)
    gated.load_state_dict(layer.state_dict())
    for of in (lambda hyper: called(layer, hyper, x), lambda hyper: call(x, hyper)):
        with forward_ad.dual_level(), torch.no_grad():
            found.append(forward_ad.unpack_dual(of(sampled(layer).linearised())))
    assert torch.equal(found[0].primal, found[1].primal)
    assert torch.equal(found[0].tangent, found[1].tangent)
    assert found[0].tangent.any()


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
@each_rank
def test_its_weights_are_decayed_as_those_of_the_gated_layer(kind, rank):
    layer, decay = converted(kind, rank), torch.linspace(0.5, 2, EXAMPLES, dtype=torch.float64)
    gated, _ = gated_layer(kind, layer, rank)
    gated.load_state_dict(layer.state_dict())
    ours, theirs = (one.weight_decay_penalty(sampled(layer), decay) for one in (layer, gated))
    assert relative_error(ours, theirs) < 1e-14


@pytest.mark.parametrize("kind", WITH_RATE)
def test_it_acts_in_training_only_and_afresh_at_every_step(kind):
    layer, x = converted(kind), inputs(kind)
    first = called(layer, sampled(layer), x)
    assert torch.equal(first, called(layer, sampled(layer), x))
    hyper = sampled(layer)
    hyper.step = hyper.step + 1  # the same hyperparameters
    assert not torch.equal(first, called(layer, hyper, x))
    layer.eval()
    assert torch.equal(called(layer, sampled(layer), x), called(layer, hyper, x))
    assert "words" in kind or "lstm" in kind or called(layer, hyper, x) is x


@pytest.mark.parametrize("kind", WITH_WEIGHTS)
def test_every_example_has_the_weights_of_its_own_hyperparameters(kind):
    layer, dim, x = converted(kind).eval(), KINDS[kind].dim, inputs(kind)
    hyper, own = sampled(layer), layer.tuned
    rows, first = called(layer, hyper, x), own.space.initial_state()[0]
    for b in range(EXAMPLES):
        own.location.copy_(first + hyper.response[b])
        model = nn.ModuleDict({"layer": layer})
        model.add_module("tuned_hyperparameters", own)
        folded = repeated(stn.fold(model)["layer"], x)
        assert relative_error(folded.select(dim, b), rows.select(dim, b)) < 1e-6  # the location is float32
        assert relative_error(folded.select(dim, b - 1), rows.select(dim, b - 1)) > 1e-3


@each_kind
@each_rank
def test_folded_it_computes_the_same_at_the_tuned_rate(kind, rank):
    model = nn.ModuleDict({"layer": converted(kind, rank)})
    own, x, original = model["layer"].tuned, inputs(kind), plain_of(kind)
    model.add_module("tuned_hyperparameters", own)
    own.location.add_(0.3)
    folded = stn.fold(model)["layer"]
    assert (type(folded), folded.training) == (type(original), True)
    assert folded.__dict__.keys() == original.__dict__.keys()
    assert folded.state_dict().keys() == original.state_dict().keys()
    assert repr(folded) == repr(original).replace("0.3", str(own.values().get("rate")))
    assert relative_error(repeated(folded.eval(), x), repeated(model["layer"].eval(), x)) < 1e-14
    if kind in WITH_WEIGHTS:
        assert relative_error(repeated(folded, x), repeated(original.eval(), x)) > 1e-3


def test_a_folded_network_can_be_converted_again():
    again = stn.convert(stn.fold(stn.convert(network(), quiet=True)), quiet=True)
    assert again.tuned_hyperparameters.values() == pytest.approx(
        {"words_dropout": 0.2, "locked": 0.2, "lstm_dropout": 0.2, "noise": 0.4, "weight_decay": 1e-4}
    )


@pytest.mark.parametrize("kind", ["locked", "locked, time first"])
def test_rows_of_an_example_have_their_own_masks_which_are_locked(kind):
    layer, dim = converted(kind), KINDS[kind].dim
    x = torch.ones([12 if size == EXAMPLES else size for size in KINDS[kind].shape])
    dropped = (called(layer, sampled(layer), x) == 0).movedim(dim, 0)  # (rows, time, features)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert (dropped[0] != dropped[1:3]).any()
    assert dropped.any()


@pytest.mark.parametrize(
    ("shape", "dim", "examples"), [((4, 3, 5, 9), 2, 0), ((5, 3, 4, 9), 0, 2), ((3, 5, 4, 9), 1, 2)]
)
def test_a_dimension_between_others_may_be_locked(shape, dim, examples):
    """By the mask that the layout with this dimension at the end has."""
    model = stn.convert(nn.ModuleList([stn.LockedDropout(0.3, dim)]), example_dims={"0": examples}, quiet=True)
    x, hyper = torch.rand(shape) + 1, sampled(model[0])
    moved = x.movedim((examples, dim), (0, -1))
    want = stn.PerExampleDropout("lockeddropout", stream=1, shared_dims=(-1,))(moved, sampled(model[0]))
    y = called(model[0], hyper, x.requires_grad_())
    torch.testing.assert_close(y, want.movedim((0, -1), (examples, dim)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@each_kind
def test_a_copy_has_hyperparameters_of_its_own(kind, copied):
    layer, x = converted(kind), inputs(kind)
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.tuned is not layer.tuned
    want = called(layer, sampled(layer), x)
    layer.tuned.location.add_(1.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(called(twin, sampled(twin), x), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@each_kind
def test_a_copy_of_the_plain_module_computes_the_same(kind, copied):
    module, x = plain_of(kind), inputs(kind)
    assert torch.equal(repeated(copied(module), x), repeated(module, x))


def test_a_network_of_all_of_them_is_tuned():
    torch.manual_seed(0)
    model = stn.convert(network(), quiet=True)
    tuner = stn.SelfTuner(model, torch.optim.SGD(model.parameters(), 0.1), F.cross_entropy)
    tokens, targets, before = inputs("words", (20, 6)), torch.arange(20) % 3, model.tuned_hyperparameters.values()
    losses = [tuner.train_step((tokens, targets)) for _ in range(3)]
    assert all(map(torch.isfinite, losses))
    tuner.valid_step((tokens, targets))
    after = model.tuned_hyperparameters.values()
    assert all(after[name] != before[name] for name in before)


@pytest.mark.parametrize("kinds", [("conv", "noise", "locked"), ("words", "locked")], ids=" ".join)
def test_a_compiled_network_without_an_lstm_computes_the_same_without_a_graph_break(kinds):
    torch.manual_seed(0)
    layers = OrderedDict({kind: KINDS[kind].make(0.3) for kind in kinds})
    model, x = respond(stn.convert(nn.Sequential(layers), quiet=True)).double(), inputs(kinds[0])
    own, graphs = model.tuned_hyperparameters, []
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, given: graphs.append(graph) or graph.forward)
    for step in range(3):
        found = []
        for one in (model, compiled):
            hyper = own.space.sample(own.location, own.raw_scale, batch_size=4, seed=0, step=step)
            with own.using(hyper):
                found.append(one(x))
        torch.testing.assert_close(*found)
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()


# What convert refuses, leaves out and reports.


@pytest.mark.parametrize("kind", SHARED)
def test_a_shared_rate_that_differs_between_examples_is_refused(kind):
    model, name = nn.ModuleDict({"layer": plain_of(kind)}), type(plain_of(kind)).__name__
    space = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.4)])
    with pytest.raises(ValueError, match=rf"'rate' must have per_example=False, because {name} uses one strength"):
        stn.convert(model, space, dropouts={"layer": "rate"})
    assert type(model["layer"]).__module__ == "stn_fast.conversion.plain"


@pytest.mark.parametrize("low", [None, -0.5])
def test_noise_that_could_be_negative_is_refused(low):
    space = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=low, high=2.0, init=0.4)])
    with pytest.raises(ValueError, match=rf"'rate' is a noise scale, so its bound low must be >= 0, got low={low}"):
        stn.convert(nn.Sequential(stn.GaussianNoise(0.3)), space, dropouts={"0": "rate"})


@pytest.mark.parametrize("kind", [kind for kind in WITH_RATE if "noise" not in kind])
def test_a_rate_that_could_reach_1_is_refused(kind):
    rate = stn.Hyperparameter("rate", low=0.0, high=1.0, init=0.4, per_example=kind not in SHARED)
    with pytest.raises(ValueError, match="'rate' is a dropout rate, so its bounds must be 0 <= low and high < 1"):
        stn.convert(nn.Sequential(plain_of(kind)), stn.HyperparameterSpace([rate]), dropouts={"0": "rate"})


@pytest.mark.parametrize("kind", SHARED)
def test_weights_are_converted_without_a_rate_if_it_is_0(kind):
    decay = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])
    model, dims = nn.ModuleDict({"layer": plain_of(kind, 0.0)}), {"layer": KINDS[kind].dim}
    respond(stn.convert(model, decay, example_dims=dims, response_rank=None, quiet=True))
    layer, x = model["layer"], inputs(kind)
    (entry,) = model.tuned_hyperparameters.report
    assert (entry.reason, entry.hyperparameter, layer.name) == (None, None, None)
    y = called(layer, sampled(layer), x)
    assert torch.equal(y, called(layer.eval(), sampled(layer), x))
    assert relative_error(y, repeated(plain_of(kind, 0.0), x)) > 1e-3
    assert stn.fold(model)["layer"].p == 0.0


@pytest.mark.parametrize("kind", WITH_RATE)
def test_a_module_at_a_rate_that_no_hyperparameter_is_stays_plain(kind):
    decay = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])
    model = nn.ModuleDict({"layer": plain_of(kind, 0.3), "linear": nn.Linear(2, 2).double()})
    entry = stn.convert(model, decay, quiet=True).tuned_hyperparameters.report[-1]
    also = ", so its weights do not respond either" if kind in SHARED else ""
    assert (entry.name, entry.reason) == ("layer", f"no hyperparameter of the space is its rate{also}")
    assert not isinstance(model["layer"], Converted)
    assert repr(model["layer"]) == repr(plain_of(kind, 0.3))


def test_draws_do_not_depend_on_which_other_rates_are_tuned():
    def made():
        several = dict(p=0.2, bidirectional=True)
        layers = {"noise": stn.GaussianNoise(0.3), "lstm": stn.DropConnectLSTM(4, 3, 2, **several)}
        layers |= {"torchs": nn.LSTM(4, 3, 4, dropout=0.2), "words": stn.EmbeddingWithDropout(5, 3, p=0.2)}
        return nn.ModuleDict({**layers, "attention": nn.MultiheadAttention(4, 2, dropout=0.1), "last": nn.Dropout(0.1)})

    suggested = stn.suggest_space(made())
    every = stn.convert(made(), suggested, quiet=True)
    assert (every["noise"].stream, every["lstm"].streams, every["torchs"].streams) == (1, (2, 3, 4, 5), (6, 7, 8))
    assert (every["words"].stream, every["attention"].stream, every["last"].stream) == (9, 10, 11)
    for rate in suggested:
        if rate.name != "weight_decay":
            alone = stn.convert(made(), stn.HyperparameterSpace([rate]), quiet=True)
            (name,) = [name for name, module in alone.items() if getattr(module, "name", None) == rate.name]
            for attribute in ("stream", "streams"):
                assert getattr(alone[name], attribute, None) == getattr(every[name], attribute, None)


def test_locked_dropout_along_the_examples_is_refused_with_what_to_declare():
    for dim, other in ((0, 1), (1, 0)):
        model = nn.Sequential(nn.Identity(), stn.LockedDropout(0.3, dim=dim))
        stn.convert(model, example_dims={"1": dim}, quiet=True)
        shape = r"its input \(4, 4, 6\)"
        message = rf"dim={dim} must be a dimension of {shape} other than {dim}.*LockedDropout\(dim={other}\)"
        with pytest.raises(ValueError, match=message):
            called(model[1], sampled(model[1]), torch.randn(4, 4, 6))
    model = stn.convert(nn.Sequential(stn.LockedDropout(0.3, dim=2)), quiet=True)
    with pytest.raises(ValueError, match=r"dim=2 must be a dimension of its input \(4, 6\)"):
        called(model[0], sampled(model[0]), torch.randn(4, 6))


def test_locked_dropout_over_the_first_dimension_has_the_examples_in_the_second():
    model = stn.convert(nn.Sequential(stn.LockedDropout(0.3), stn.LockedDropout(0.3, dim=1)), quiet=True)
    assert [one.example_dim for one in model[:2]] == [1, 0]
    with pytest.raises(ValueError, match=r"use LockedDropout\(dim=1\) if its input is \(B, T, D\), or leave"):
        called(model[0], sampled(model[0]), torch.randn(4, 5, 6))


@pytest.mark.parametrize(
    ("kind", "attribute"), [("noise", "std"), ("locked", "p"), ("words", "p"), ("lstm", "p"), ("lstm, time first", "p")]
)
def test_the_strength_is_read_in_evaluation_mode_only_and_is_not_set(kind, attribute):
    layer = converted(kind)
    with pytest.raises(RuntimeError, match=rf"layer \(\w+\): its {attribute} is read in training mode"):
        getattr(layer, attribute)
    assert getattr(layer.eval(), attribute) == layer.tuned.values()["rate"]
    with pytest.raises(AttributeError, match=rf"layer \(\w+\): {attribute} can't be set.*hyperparameter 'rate'"):
        setattr(layer, attribute, 0.1)


@each_kind
def test_training_mode_needs_hyperparameters_for_each_example(kind):
    with pytest.raises(RuntimeError, match=r"layer \(\w+\) is in training mode.*using\(hyper\)"):
        converted(kind)(inputs(kind))


class Louder(stn.GaussianNoise):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_are_left_out():
    model = stn.convert(nn.Sequential(nn.Linear(2, 2), Louder(0.3)), quiet=True)
    assert "it is a subclass of GaussianNoise, whose forward may differ" in model.tuned_hyperparameters.report[1].reason
    assert "noise" not in " ".join(model.tuned_hyperparameters.space.names)


@pytest.mark.parametrize("kind", SHARED)
def test_the_hyperparameter_that_is_its_rate_is_shown(kind):
    assert "p='rate'" in repr(converted(kind))


def test_an_lstm_called_with_other_parameters_drops_those():
    """As `torch.func.functional_call` does, and optimizers that swap weights."""
    lstm, x = stn.DropConnectLSTM(6, 5, p=0.5), torch.randn(3, 4, 6)
    halves = {name: (one / 2).detach().requires_grad_() for name, one in lstm.named_parameters()}
    other = stn.DropConnectLSTM(6, 5, p=0.5)
    other.load_state_dict(halves)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return [repeated(self.lstm, x) for _ in range(2)]

    named = {f"lstm.{name}": one for name, one in halves.items()}
    for y in torch.func.functional_call(Twice(), named, (x,)):
        torch.testing.assert_close(y, repeated(other, x))
        assert not torch.equal(y, other.eval()(x)[0])
        other.train()
        assert all(one.any() for one in torch.autograd.grad(y.square().sum(), list(halves.values())))


@pytest.mark.parametrize("batched", [True, False])
def test_an_lstm_that_drops_weights_takes_the_inputs_of_torchs(batched):
    lstm = stn.DropConnectLSTM(6, 5, 2, p=1e-9, batch_first=True, bidirectional=True)
    torchs = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
    torchs.load_state_dict(lstm.state_dict())
    x, state = torch.randn(4, 3, 6), (torch.randn(4, 4, 5), torch.randn(4, 4, 5))
    if not batched:
        x, state = x[0], tuple(one[:, 0] for one in state)
    for given in ((x,), (x, state)):
        for ours, theirs in zip(leaves(lstm(*given)), leaves(torchs(*given)), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size\. Expected 6, got 7"):
        lstm(torch.randn(4, 3, 7))


@pytest.mark.parametrize("layer", [stn.GaussianNoise(0.1), stn.LockedDropout(0.1, dim=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_inputs_that_are_no_floating_point_numbers_are_refused_by_the_name_of_the_module(layer, dtype):
    model, x, kind = nn.ModuleDict({"layer": copy.deepcopy(layer)}), torch.ones(4, 3, 2).to(dtype), type(layer).__name__
    says = f"the input must be a tensor of floating point numbers, got {dtype}"
    with pytest.raises(TypeError, match=f"^{kind}: {says}"):
        model["layer"](x)
    converted = stn.convert(model, quiet=True)["layer"]
    with pytest.raises(TypeError, match=rf"^layer \({kind}\): {says}"), converted.tuned.using(sampled(converted)):
        converted(x)


def test_inputs_with_too_few_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"^LockedDropout: dim=2 must be a dimension of the input, which is \(4, 3\)"):
        stn.LockedDropout(0.1, dim=2)(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"^DropConnectLSTM: the input must have 2 or 3 dimensions, got \(6,\)"):
        stn.DropConnectLSTM(6, 5, p=0.5)(torch.ones(6))


def test_a_packed_sequence_can_not_be_trained_on():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])
    lstm = stn.DropConnectLSTM(6, 5, p=0.5)
    with pytest.raises(TypeError, match="PackedSequence is not supported in training mode"):
        lstm(packed)
    lstm.eval()(packed)
