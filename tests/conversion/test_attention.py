"""Converted attention of torch, and transformers that contain it: plain at first, per example, dropped, folded."""

import copy

import pytest
import torch
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn
from torch.func import functional_call

import stn_fast as stn
from stn_fast.training.task import with_weight_decay

WIDTH, HEADS, EXAMPLES, TIME, KEYS = 6, 2, 4, 5, 3
WEIGHT_DECAY = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])
KINDS = {
    "batch first": dict(batch_first=True),
    "time first": dict(),
    "without bias": dict(bias=False, batch_first=True),
    "other widths": dict(kdim=4, vdim=7, batch_first=True),
    "other widths without bias": dict(kdim=4, bias=False),
    "bias of keys and values": dict(add_bias_kv=True, add_zero_attn=True),
    "zero": dict(add_zero_attn=True, batch_first=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
CAUSAL = torch.triu(torch.ones(TIME, TIME, dtype=torch.bool), 1)
PADDING = torch.arange(TIME) >= torch.tensor([5, 4, 3, 1])[:, None]
SLOPE = torch.linspace(-1, 1, EXAMPLES * HEADS * TIME * TIME, dtype=torch.float64).view(-1, TIME, TIME)
CALLS = {
    "weights": dict(),
    "weights of heads": dict(average_attn_weights=False, attn_mask=CAUSAL),
    "no weights": dict(need_weights=False),
    "causal": dict(need_weights=False, attn_mask=CAUSAL, is_causal=True),
    "causal and padding": dict(need_weights=False, attn_mask=CAUSAL, is_causal=True, key_padding_mask=PADDING),
    "padding": dict(key_padding_mask=PADDING),
    "mask for each": dict(need_weights=False, attn_mask=SLOPE),
    "numbers": dict(attn_mask=SLOPE[0], key_padding_mask=-PADDING.double(), need_weights=False),
}


class Attention(nn.Module):
    """Self-attention with a residual, called with (B, T, D), whatever layout the attention has."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, query, key=None, value=None, **options):
        key, value = query if key is None else key, query if value is None else value
        given = [query, key, value]
        if not self.attention.batch_first:
            given = [query.transpose(0, 1)] * 3 if query is key is value else [x.transpose(0, 1) for x in given]
        y, weights = self.attention(*given, **options)
        return y if self.attention.batch_first else y.transpose(0, 1), weights


def plain(kind, **more):
    torch.manual_seed(0)
    model = Attention(**KINDS[kind], **more).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(kind, rows=EXAMPLES, seed=1):
    """One tensor for self-attention, or three."""
    options, generator = KINDS[kind], torch.Generator().manual_seed(seed)
    sizes = [(TIME, WIDTH)]
    if "kdim" in options:
        sizes += [(KEYS, options["kdim"]), (KEYS, options.get("vdim", WIDTH))]
    return [torch.randn(rows, *size, generator=generator, dtype=torch.float64) for size in sizes]


def gradients(y, model, *given):
    y, weights = y
    generator = torch.Generator().manual_seed(3)
    loss = (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, generator=generator, dtype=y.dtype)).sum()
    loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    return own | {str(i): x.grad for i, x in enumerate(given)}


def assert_same(found, want, exact=1e-12):
    assert relative_error(found[0], want[0]) < exact
    assert (found[1] is None) == (want[1] is None)
    if want[1] is not None:
        assert relative_error(found[1], want[1]) < exact


def assert_converts_to_the_same(model, given, options, training, response_rank="auto"):
    model.train(training)
    tuned = stn.convert(copy.deepcopy(model), WEIGHT_DECAY, response_rank=response_rank, quiet=True)
    ours, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    want = model(*theirs, **options)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(*ours, **options)
    assert_same(y, want)
    found = gradients(y, tuned, *ours)
    for name, gradient in gradients(want, model, *theirs).items():
        assert relative_error(found[name], gradient) < 1e-11, name
    if not training:
        with torch.no_grad():  # torch's takes its fast path
            assert_same(tuned(*ours, **options), model(*theirs, **options))


@each_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("response_rank", ["auto", None])
def test_a_new_conversion_changes_no_output_and_no_gradient(kind, training, response_rank):
    assert_converts_to_the_same(plain(kind), inputs(kind), {}, training, response_rank)


@pytest.mark.parametrize("kind", ["batch first", "time first", "bias of keys and values", "zero"])
@pytest.mark.parametrize("call", CALLS)
def test_a_new_conversion_has_the_masks_and_the_weights_of_torch(kind, call):
    for training in (True, False):
        assert_converts_to_the_same(plain(kind), inputs(kind), CALLS[call], training)


@pytest.mark.parametrize("kind", ["batch first", "time first"])
def test_keys_and_values_may_be_others_than_the_queries(kind):
    query, key, value = (inputs(kind, seed=seed)[0] for seed in (1, 2, 3))
    for given in ([query, key[:, :KEYS], value[:, :KEYS]], [query, key, key], [query, query, value]):
        assert_converts_to_the_same(plain(kind), given, {}, True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_without_a_batch_dimension(batch_first):
    model = plain("batch first" if batch_first else "time first").attention
    tuned, x = converted(nn.Sequential(copy.deepcopy(model)), space=WEIGHT_DECAY)[0], torch.randn(TIME, WIDTH).double()
    options = dict(attn_mask=SLOPE[:HEADS], key_padding_mask=-9 * PADDING[1].double())
    fresh = stn.convert(nn.Sequential(copy.deepcopy(model)), WEIGHT_DECAY, quiet=True)
    with fresh.tuned_hyperparameters.using(sampled(fresh, 1)):
        assert_same(fresh[0](x, x, x, **options), model(x, x, x, **options))
    batch = x[None] if batch_first else x[:, None]
    with tuned.tuned.using(sampled(fresh, 1)):
        y, weights = tuned(x, x, x)
        want, wanted_weights = tuned(batch, batch, batch)
    assert_same((y, weights), (want.view(TIME, WIDTH), wanted_weights[0]))


def effective(attention, h):
    """The parameters of plain attention at a response input (n,), by name."""

    def weight(owner, weight, ending):
        response = getattr(owner, f"response_weight{ending}")
        projection = getattr(owner, f"response_projection{ending}")
        scale = getattr(owner, f"weight_gate{ending}") @ h
        return getattr(owner, weight) + scale[:, None] * (response if projection is None else response @ projection)

    out, found = attention.out_proj, {}
    names = ["in_proj"] if attention.in_proj_weight is not None else ["q_proj", "k_proj", "v_proj"]
    for name in names:
        found[f"{name}_weight"] = weight(attention, f"{name}_weight", f"_{name}")
    found["out_proj.weight"] = weight(out, "weight", "")
    if attention.in_proj_bias is not None:
        responses = torch.cat([getattr(attention, f"response_bias_{name}") for name in names])
        gates = torch.cat([getattr(attention, f"bias_gate_{name}") for name in names])
        found["in_proj_bias"] = attention.in_proj_bias + (gates @ h) * responses
        found["out_proj.bias"] = out.bias + (out.bias_gate @ h) * out.response_bias
    return found


@each_kind
@pytest.mark.parametrize("response_rank", [1, None])
def test_each_example_has_the_attention_with_its_effective_weights(kind, response_rank):
    model = plain(kind)
    tuned, given = converted(copy.deepcopy(model), response_rank=response_rank), inputs(kind)
    hyper = sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        y, weights = tuned(*given)
    for i, h in enumerate(hyper.response.double()):
        own = {f"attention.{name}": value for name, value in effective(tuned.attention, h).items()}
        want = functional_call(model, own, tuple(x[i : i + 1] for x in given))
        assert_same((y[i : i + 1], weights[i : i + 1]), want)
        with tuned.tuned_hyperparameters.using(hyper[i : i + 1]):
            assert_same(tuned(*(x[i : i + 1] for x in given)), want)
    assert relative_error(y, model(*given)[0]) > 1e-2
    tuned.eval()
    location = tuned.tuned_hyperparameters.space.at(tuned.tuned_hyperparameters.location, batch_size=1).response[0]
    own = {f"attention.{name}": value for name, value in effective(tuned.attention, location.double()).items()}
    assert_same(tuned(*given), functional_call(model.eval(), own, tuple(given)))


@pytest.mark.parametrize("kind", ["batch first", "time first"])
def test_consecutive_rows_share_the_hyperparameters_of_their_example(kind):
    tuned, (x,) = converted(plain(kind, dropout=0.4)), inputs(kind, 3 * EXAMPLES)
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)
    with own.using(hyper):
        y = tuned(x)[0]
    for i in range(EXAMPLES):
        with own.using(sampled(tuned)[i : i + 1]):
            assert relative_error(tuned(x[3 * i : 3 * i + 3])[0], y[3 * i : 3 * i + 3]) < 1e-12


@pytest.mark.parametrize("kind", ["batch first", "time first", "bias of keys and values"])
def test_attention_weights_are_dropped_at_the_rate_of_their_example(kind):
    model = plain(kind, dropout=0.3)
    tuned = stn.convert(copy.deepcopy(model), quiet=True)
    own, x = tuned.tuned_hyperparameters, torch.randn(EXAMPLES * 2, 40, WIDTH, dtype=torch.float64)
    assert own.space.names == ("attention_dropout", "weight_decay")
    assert own.space["attention_dropout"].init == pytest.approx(0.3)
    own.raw_scale.fill_(1.0)
    hyper = sampled(tuned)
    with own.using(hyper):
        y, weights = tuned(x, average_attn_weights=False)
    with own.using(sampled(tuned)):
        assert torch.equal(tuned(x, need_weights=False)[0], y)
    rates = hyper["attention_dropout"].double().repeat_interleave(2)
    undropped = model.eval()(x, average_attn_weights=False)[1]
    kept = weights != 0
    want = undropped / (1 - rates.view(-1, 1, 1, 1))
    assert relative_error(weights[kept], want[kept]) < 1e-6  # the rates are float32
    assert (kept.double().mean((1, 2, 3)) - (1 - rates)).abs().max() < 0.04
    assert (kept[0] != kept[1]).any()
    assert (kept[:, 0] != kept[:, 1]).any()
    assert_same(tuned.eval()(x), model(x))


def test_attention_without_dropout_has_no_rate():
    tuned = stn.convert(plain("batch first"), quiet=True)
    assert tuned.tuned_hyperparameters.space.names == ("weight_decay",)


def test_attention_whose_rate_is_not_in_the_space_is_left_out():
    tuned = stn.convert(nn.ModuleList([nn.Linear(2, 2), plain("zero", dropout=0.1)]), WEIGHT_DECAY, quiet=True)
    (entry,) = [one for one in tuned.tuned_hyperparameters.report if one.kind == "MultiheadAttention"]
    assert entry.reason == "no hyperparameter of the space is its rate, so its weights do not respond either"


@each_kind
def test_the_folded_attention_computes_the_same_and_a_plain_state_loads(kind):
    model = plain(kind, dropout=0.2)
    tuned, given = converted(copy.deepcopy(model)), inputs(kind)
    missing, unexpected = tuned.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not [name for name in missing if "response" not in name and "gate" not in name and "tuned" not in name]
    result = stn.fold(tuned)
    assert [type(one) for one in result.modules()] == [type(one) for one in model.modules()]
    for one, other in zip(result.modules(), model.modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys()
    assert result.state_dict().keys() == model.state_dict().keys()
    assert result.attention.dropout == tuned.tuned_hyperparameters.values()["attention_dropout"]
    with torch.no_grad():
        assert_same(result.eval()(*given), tuned.eval()(*given))
        assert relative_error(result(*given)[0], model.eval()(*given)[0]) > 1e-2
    stn.convert(result, quiet=True)


@each_kind
def test_every_parameter_and_the_hyperparameters_get_a_gradient(kind):
    tuned = converted(plain(kind)).eval()
    own = tuned.tuned_hyperparameters
    location = own.location.clone().requires_grad_()
    with own.using(sampled(tuned, EXAMPLES, location=location)):
        tuned(*inputs(kind))[0].square().sum().backward()
    assert location.grad.all()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tuned.parameters())


@each_kind
def test_the_penalty_of_weight_decay_is_that_of_the_effective_weights(kind):
    tuned = converted(plain(kind))
    hyper = sampled(tuned)
    want = 0.0
    for h, decay in zip(hyper.response.double(), hyper["weight_decay"].double(), strict=True):
        weights = [value for name, value in effective(tuned.attention, h).items() if "weight" in name]
        want += 0.5 * decay * sum(weight.square().sum() for weight in weights) / EXAMPLES
    assert relative_error(with_weight_decay(torch.zeros(()).double(), tuned, hyper), want) < 1e-6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_attention_cannot_take_is_an_error_that_names_it():
    tuned, (x,) = stn.convert(plain("batch first"), quiet=True).eval(), inputs("batch first")
    attention = tuned.attention
    cases = [
        ((x, x[:2], x[:2]), {}, r"query, key and value must be \(N, T, E\) or \(T, E\) and fit, got \(4, 5, 6\), \(2,"),
        ((x, x, x[:, 1:]), {}, "query, key and value must be"),
        ((x, x, x), dict(is_causal=True), "is_causal=True says what attn_mask is: give attn_mask, too"),
        ((x, x, x), dict(attn_mask=CAUSAL[1:]), r"attn_mask must be \(5, 5\) or \(8, 5, 5\), got \(4, 5\)"),
        ((x, x, x), dict(key_padding_mask=CAUSAL), r"key_padding_mask must be \(4, 5\), got \(5, 5\)"),
        ((x, x, x), dict(attn_mask=CAUSAL.long()), r"masks must be bool or floating point, got torch\.int64"),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=rf"attention \(MultiheadAttention\): {message}"):
            attention(*given, **options)
    nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(TypeError, match="nested tensors are not supported"):
        attention(nested, nested, nested)
    with (
        tuned.tuned_hyperparameters.using(sampled(tuned, 3)),
        pytest.raises(ValueError, match=r"dimension 0 of its input \(4, 5, 6\) must count the 3 examples"),
    ):
        attention(x, x, x)


@pytest.mark.parametrize("more", [dict(add_zero_attn=True), dict(add_bias_kv=True)], ids=str)
def test_causal_attention_that_drops_masks_what_torch_masks(more):
    """In training mode with a rate of almost 0, it is that of evaluation mode, added keys and values included."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.MultiheadAttention(8, 2, dropout=1e-9, batch_first=True, **more).double())
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), torch.triu(torch.full((5, 5), -torch.inf), 1).double()
    given = dict(attn_mask=mask, is_causal=True, need_weights=False)
    want, _ = plain.eval()[0](x, x, x, **given)
    tuned = stn.convert(plain, quiet=True)
    with tuned.tuned_hyperparameters.using(sampled(tuned, examples=3)):
        found, _ = tuned.train()[0](x, x, x, **given)
    assert relative_error(found, want) < 1e-6


class Read(nn.Module):
    """Attention and a layer after it."""

    def __init__(self, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 2)
        self.out = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.head(self.attention(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize(("pattern", "name"), [("attention", "own"), ("head", "weight_decay")])
def test_the_output_projection_is_decayed_with_its_attention(pattern, name):
    tuned = stn.convert(Read().double(), [stn.WeightDecay(pattern, name=name, init=0.5)], quiet=True)
    weights = [tuned.attention.in_proj_weight, tuned.attention.out_proj.weight]
    weights = weights if pattern == "attention" else [tuned.head.weight]
    own = tuned.tuned_hyperparameters
    found = with_weight_decay(torch.zeros((), dtype=torch.float64), tuned, own.space.at(own.location, batch_size=2))
    assert relative_error(found, 0.25 * sum(weight.square().sum() for weight in weights)) < 1e-6


def test_attention_without_its_output_projection_is_left_out():
    tuned = converted(Read(), exclude="attention.out_proj")
    assert type(tuned.attention) is nn.MultiheadAttention
    (entry,) = [entry for entry in tuned.tuned_hyperparameters.report if entry.name == "attention"]
    assert entry.asked
    assert "in exclude" in entry.reason


def test_the_output_projection_is_dropped_only_where_it_is_called():
    added = [stn.Dropout("*out*", name="rate")]
    plain = converted(Read(), space=added, exclude="attention").tuned_hyperparameters
    assert [one.modules for one in plain.added] == [("out",)]
    tuned = converted(Read(batch_first=False), space=added, example_dims={"head": 1, "out": 1})
    assert [one.modules for one in tuned.tuned_hyperparameters.added] == [("attention.out_proj", "out")]
    with tuned.tuned_hyperparameters.using(sampled(tuned, examples=3)):
        assert tuned.train()(torch.randn(5, 3, 8)).shape == (5, 3, 2)
