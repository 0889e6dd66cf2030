"""Transformers of torch: all they contain is converted, and called in evaluation mode, too; and what is left out."""

import copy

import pytest
import torch
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast.conversion import check_rows
from stn_fast.conversion.rules import RULES

WIDTH, EXAMPLES, TIME = 6, 4, 5
WEIGHT_DECAY = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])
PADDING = torch.arange(TIME) >= torch.tensor([5, 4, 3, 1])[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=torch.float64)
LAYERS = {
    "after": {},
    "first": dict(norm_first=True),
    "gelu": dict(activation="gelu"),
    "own": dict(activation=torch.tanh),
}


def layer(batch_first=True, dropout=0.0, **options):
    return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout, batch_first=batch_first, **options)


def made(make):
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoder(dropout=0.0):
    return nn.TransformerEncoder(layer(dropout=dropout), 2, nn.LayerNorm(WIDTH))


def inputs(examples=EXAMPLES):
    return torch.randn(examples, TIME, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class TimeFirst(nn.Module):
    """A transformer of sequences (T, B, D), called with (B, T, D)."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 8, 0.2)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.transformer(x, 2 * x, tgt_mask=CAUSAL, tgt_is_causal=True).transpose(0, 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_new_conversion_of_a_layer_changes_no_output_and_no_gradient(kind, training):
    model, x = made(lambda: layer(**LAYERS[kind])).train(training), inputs()
    tuned = stn.convert(copy.deepcopy(model), WEIGHT_DECAY, quiet=True)
    want = model(x, CAUSAL, is_causal=True)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x, CAUSAL, is_causal=True)
    assert relative_error(y, want) < 1e-12
    want.square().sum().backward()
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(tuned.get_parameter(name).grad, parameter.grad) < 1e-11, name
    if not training:
        with torch.no_grad():
            assert relative_error(tuned(x), model(x)) < 1e-12


@pytest.fixture
def no_fast_path(monkeypatch):
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_nested_tensor_from_mask"):
        monkeypatch.setattr(torch, name, lambda *given: pytest.fail("the fast path"))


@pytest.mark.parametrize("options", [{}, dict(exclude="*.self_attn"), dict(include="*.linear1")], ids=str)
@pytest.mark.usefixtures("no_fast_path")
def test_each_example_has_its_own_hyperparameters_in_evaluation_mode(options):
    model, x = made(encoder).eval(), inputs()
    tuned = converted(copy.deepcopy(model), space=WEIGHT_DECAY, **options).eval()
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)
    with torch.no_grad():
        with own.using(hyper):
            y = tuned(x, src_key_padding_mask=PADDING)
        for i in range(EXAMPLES):
            with own.using(hyper[i : i + 1]):
                one = tuned(x[i : i + 1], src_key_padding_mask=PADDING[i : i + 1])
            assert relative_error(one[0], y[i]) < 1e-12
        with own.using(hyper[:1]):
            assert relative_error(tuned(x[1:2], src_key_padding_mask=PADDING[1:2])[0], y[1]) > 1e-4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_folded_encoder_computes_the_same_by_its_fast_path():
    model, x = made(lambda: encoder(0.1)), inputs()
    tuned = converted(copy.deepcopy(model))
    result, kept = stn.fold(tuned), ~PADDING[:, :, None]
    assert [type(one) for one in result.modules()] == [type(one) for one in model.modules()]
    for one, other in zip(result.modules(), model.modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys()
    values = tuned.tuned_hyperparameters.values()
    first = result.layers[0]
    assert (first.self_attn.dropout, first.dropout2.p) == (values["self_attn_dropout"], values["dropout2"])
    with torch.no_grad():
        for options in ({}, dict(src_key_padding_mask=PADDING)):
            y, want = (one.eval()(x, **options) * kept for one in (result, tuned))
            assert relative_error(y, want) < 1e-12
        assert relative_error(y, model.eval()(x, **options) * kept) > 1e-2


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_dimension_of_examples_follows_batch_first_in_all_of_a_transformer():
    tuned, x = converted(made(TimeFirst)), inputs()
    own = tuned.tuned_hyperparameters
    check_rows(tuned, x)
    with own.using(sampled(tuned)):
        y = tuned(x)
    for i in range(EXAMPLES):
        with own.using(sampled(tuned)[i : i + 1]):
            assert relative_error(tuned(x[i : i + 1])[0], y[i]) < 1e-12


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(("inner", "kind"), [("linear1", "Linear"), ("self_attn.out_proj", "NonDynamically.*")])
def test_another_dimension_than_batch_first_says_is_refused_in_a_layer_of_a_transformer(inner, kind):
    name = f"transformer.encoder.layers.0.{inner}"
    says = rf"example_dims\['\*{inner}'\] is 0, but dimension 1 of the input of {name} \({kind}\) counts examples"
    with pytest.raises(ValueError, match=says):
        stn.convert(made(TimeFirst), quiet=True, example_dims={f"*{inner}": 0})
    declared = stn.convert(made(TimeFirst), quiet=True, example_dims={f"*{inner}": 1, "transformer.encoder.norm": 0})
    assert declared.get_submodule(name).example_dim == 1
    assert declared.transformer.encoder.norm.example_dim == 0


def test_a_layer_in_which_nothing_is_converted_stays_plain():
    model = nn.ModuleDict({"encoder": encoder(), "linear": nn.Linear(2, 2)})
    tuned = stn.convert(model, exclude="encoder", quiet=True)
    assert type(tuned["encoder"]) is nn.TransformerEncoder
    assert type(tuned["encoder"].layers[0]) is nn.TransformerEncoderLayer


def test_a_transformer_is_tuned():
    torch.manual_seed(0)
    tuned = stn.convert(nn.Sequential(encoder(0.2).float(), nn.Flatten(), nn.Linear(TIME * WIDTH, 2)), quiet=True)
    assert [entry.kind for entry in tuned.tuned_hyperparameters.report if entry.reason is not None] == []
    tuner = stn.SelfTuner(tuned, torch.optim.Adam(tuned.parameters()), nn.functional.cross_entropy)
    before = tuner.values()
    batch = inputs().float(), torch.tensor([0, 1, 0, 1])
    for _ in range(3):
        tuner.step(batch, batch)
    moved = [name for name, value in tuner.values().items() if value != before[name]]
    assert moved == ["self_attn_dropout", "dropout", "dropout1", "dropout2", "weight_decay"]


def test_a_compiled_layer_is_one_graph():
    tuned, x = converted(made(lambda: layer(dropout=0.2))), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(tuned, fullgraph=True, backend="eager")
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = compiled(x)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        torch.testing.assert_close(y, tuned(x))
    torch._dynamo.reset()


def reason(attention):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "attention": attention})
    kinds = [type(one) for one in attention.modules()]
    stn.convert(model, quiet=True)
    assert kinds == [type(one) for one in attention.modules()]
    entries = model.tuned_hyperparameters.report[1:]
    assert [entry.name for entry in entries] == ["attention"]
    return entries[0].reason


class Own(nn.MultiheadAttention):
    pass


class OwnLayer(nn.TransformerEncoderLayer):
    pass


def test_attention_that_cannot_be_converted_is_left_out_with_all_it_contains():
    frozen, adapted = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    frozen.out_proj.weight.requires_grad_(False)
    adapted.out_proj = nn.Sequential(nn.Linear(4, 4))
    assert "is frozen" in reason(frozen)
    assert reason(adapted) == "its out_proj is a Sequential"
    for own in (Own(4, 2), OwnLayer(4, 2, 8)):
        assert reason(own) == "its forward reads the parameters of its children directly"
    normed = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert "parametrized" in reason(normed)


def test_a_rule_that_fails_leaves_a_transformer_as_it_was(monkeypatch):
    def failing(module, context):
        raise KeyError("no")

    model = nn.ModuleList([layer(), nn.Conv1d(1, 1, 1)])
    before = {name: type(module) for name, module in model.named_modules()}, list(model.state_dict())
    monkeypatch.setitem(RULES, nn.Conv1d, failing)
    with pytest.raises(KeyError, match="no"):
        stn.convert(model, quiet=True)
    assert before == ({name: type(module) for name, module in model.named_modules()}, list(model.state_dict()))
