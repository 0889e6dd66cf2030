"""Norms of timm and transformers, whose classes are imitated here: known by names and behaviour, in their precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn
from torch.func import functional_call

import stn_fast as stn
from stn_fast.conversion.rules import RULES

WIDTH, EXAMPLES = 6, 4


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class RmsNorm(nn.Module):
    def __init__(self, channels, eps=1e-2):
        super().__init__()
        self.normalized_shape, self.eps, self.weight = (channels,), eps, nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class RmsNorm2d(RmsNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.view(1, -1, 1, 1)


class GroupNorm1(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _Activated(nn.Module):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)


class GroupNormAct(_Activated, nn.GroupNorm):
    def forward(self, x):
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class BatchNormAct2d(_Activated, nn.BatchNorm2d):
    def forward(self, x):
        return self.act(self.drop(nn.BatchNorm2d.forward(self, x)))


class LlamaRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-2):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states):
        return self.weight * self._norm(hidden_states.to(torch.float32)).to(hidden_states.dtype)


class Olmo2RMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return (self.weight * self._norm(hidden_states.to(torch.float32))).to(hidden_states.dtype)


class GemmaRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


IMAGES, ROWS = (WIDTH, 3, 2), (5, WIDTH)
TIMM = {
    LayerNorm: ((WIDTH,), ROWS),
    LayerNorm2d: ((WIDTH,), IMAGES),
    RmsNorm: ((WIDTH,), ROWS),
    RmsNorm2d: ((WIDTH,), IMAGES),
    GroupNorm1: ((1, WIDTH), IMAGES),
    GroupNormAct: ((2, WIDTH), IMAGES),
    BatchNormAct2d: ((WIDTH,), IMAGES),
}
TRANSFORMERS = dict.fromkeys((LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm, T5LayerNorm), ((WIDTH,), ROWS))
SIZES = TIMM | TRANSFORMERS
each_norm = pytest.mark.parametrize("kind", SIZES)


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    for kind in TIMM:
        monkeypatch.setattr(kind, "__module__", "timm.layers.norm")
    for kind in TRANSFORMERS:
        monkeypatch.setattr(kind, "__module__", "transformers.models.own")


def made(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(kind(*SIZES[kind][0])).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def rows(kind, examples=EXAMPLES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, *SIZES[kind][1], generator=generator).to(dtype)


def gradients(y, model, x):
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)).sum().backward()
    return {"x": x.grad} | {name: parameter.grad for name, parameter in model.named_parameters()}


@each_norm
@pytest.mark.parametrize("training", [True, False])
def test_a_new_conversion_changes_no_output_and_no_gradient(kind, training):
    model = made(kind).train(training)
    tuned, x, same = stn.convert(copy.deepcopy(model), quiet=True), rows(kind).requires_grad_(), rows(kind)
    want, y_x = model(x), same.requires_grad_()
    expected = gradients(want, model, x)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(y_x)
    assert relative_error(y, want) < 1e-12
    found = gradients(y, tuned, y_x)
    for name, gradient in expected.items():
        exact = 1e-6 if kind is GemmaRMSNorm else 1e-12  # Gemma's are summed in float32
        assert relative_error(found[name], gradient) < exact, name
    assert found["0.response_weight"].any()


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_that_of_the_plain_norm_bit_for_bit(kind, dtype):
    model, x = made(kind, dtype), rows(kind, dtype=torch.bfloat16)
    want = model(x)
    tuned = stn.convert(model, quiet=True)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x)
    assert y.dtype == want.dtype
    assert torch.equal(y, want)
    assert torch.equal(tuned.eval()(x), want)


def test_the_normalisation_of_timms_rms_norm_of_images_is_in_the_dtype_of_its_input():
    model, x = made(RmsNorm2d, torch.bfloat16), rows(RmsNorm2d, dtype=torch.bfloat16)
    want = model(x)
    tuned = stn.convert(model, quiet=True)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        assert torch.equal(tuned(x), want)


@each_norm
def test_each_example_has_the_norm_with_its_effective_weights(kind):
    plain = made(kind).eval()
    tuned, x = converted(copy.deepcopy(plain)).eval(), rows(kind)
    hyper, norm = sampled(tuned), tuned[0]
    with tuned.tuned_hyperparameters.using(hyper):
        y = tuned(x)
    for i, h in enumerate(hyper.response.double()):
        own = {"0.weight": norm.weight + (norm.weight_gate @ h) * norm.response_weight}
        if getattr(norm, "bias", None) is not None:
            own["0.bias"] = norm.bias + (norm.bias_gate @ h) * norm.response_bias
        assert relative_error(y[i], functional_call(plain, own, x[i : i + 1])[0]) < 1e-6
        with tuned.tuned_hyperparameters.using(hyper[i : i + 1]):
            assert relative_error(tuned(x[i : i + 1])[0], y[i]) < 1e-12
    assert relative_error(y, plain(x)) > 1e-2


@each_norm
def test_consecutive_rows_share_the_hyperparameters_of_their_example(kind):
    tuned, x = converted(made(kind)).eval(), rows(kind, 3 * EXAMPLES)
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)
    with own.using(hyper):
        y = tuned(x)
    for i in range(EXAMPLES):
        with own.using(hyper[i : i + 1]):
            assert relative_error(tuned(x[3 * i : 3 * i + 3]), y[3 * i : 3 * i + 3]) < 1e-12


@pytest.mark.parametrize("kind", [LayerNorm, RmsNorm, LlamaRMSNorm])
def test_a_declared_dimension_counts_the_examples(kind):
    tuned, plain_dims, x = converted(made(kind), example_dims={"0": 1}), converted(made(kind)), rows(kind)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x.transpose(0, 1))
    with plain_dims.tuned_hyperparameters.using(sampled(plain_dims)):
        assert relative_error(y.transpose(0, 1), plain_dims(x)) < 1e-12


@pytest.mark.parametrize("kind", [LayerNorm2d, RmsNorm2d, GroupNormAct, BatchNormAct2d])
def test_the_first_dimension_of_images_counts_the_examples(kind):
    with pytest.raises(ValueError, match=r"but dimension 0 of the input of 0 .* counts examples"):
        stn.convert(made(kind), example_dims={"0": 1})


@each_norm
def test_the_folded_norm_computes_the_same_and_a_plain_state_loads(kind):
    plain = made(kind)
    tuned, x = converted(copy.deepcopy(plain)), rows(kind)
    missing, unexpected = tuned.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("0.response", "0.weight_gate", "0.bias_gate", "tuned_hyper")) for name in missing)
    result = stn.fold(tuned)
    assert type(result[0]) is kind
    assert result[0].__dict__.keys() == plain[0].__dict__.keys()
    assert result.state_dict().keys() == plain.state_dict().keys()
    assert relative_error(result.eval()(x), tuned.eval()(x)) < 1e-7  # Gemma's is computed in float32
    assert relative_error(result(x), plain.eval()(x)) > 1e-2


@each_norm
def test_the_hyperparameters_get_a_gradient_and_no_decay(kind):
    tuned = converted(made(kind)).eval()
    own = tuned.tuned_hyperparameters
    location = own.location.clone().requires_grad_()
    with own.using(sampled(tuned, EXAMPLES, location=location)):
        tuned(rows(kind)).square().sum().backward()
    assert location.grad.all()
    assert tuned[0].weight_decay_penalty(sampled(tuned), torch.ones(EXAMPLES)) == 0


def test_a_compiled_norm_of_transformers_is_one_graph():
    tuned, x = converted(made(LlamaRMSNorm)), rows(LlamaRMSNorm)
    torch._dynamo.reset()
    compiled = torch.compile(tuned, fullgraph=True, backend="eager")
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        assert torch.equal(compiled(x), tuned(x))
    torch._dynamo.reset()


def reason(module):
    model = nn.Sequential(nn.Linear(2, 2), module)
    stn.convert(model, quiet=True)
    assert type(model[1]) is type(module)
    return model.tuned_hyperparameters.report[1].reason


class Fused(LlamaRMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class OfTheBatch(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean() + self.variance_epsilon)


class Mixing(LlamaRMSNorm):
    def forward(self, x):
        return self._norm(x) * self.weight.mean()


class Gated(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x * gate)


class Flat(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x).flatten()


@pytest.mark.parametrize("kind", [Fused, OfTheBatch, Mixing, Gated, Flat])
def test_a_norm_of_transformers_whose_weight_cannot_be_one_per_example_is_left_out(kind):
    found = type(f"{kind.__name__}RMSNorm", (kind,), {"__module__": "transformers.models.own"})
    assert reason(found(WIDTH)) == "its forward can't have a weight for each example"


@pytest.mark.parametrize("module", ["mine.models", "transformers_like.norms"])
def test_norms_of_other_packages_are_left_out(module):
    found = type("LlamaRMSNorm", (LlamaRMSNorm,), {"__module__": module})
    assert "there is no rule for its class" in reason(found(WIDTH))


@pytest.mark.parametrize("more", [nn.Parameter(torch.zeros(WIDTH)), nn.Buffer(torch.zeros(WIDTH)), nn.ReLU()], ids=type)
def test_a_norm_of_transformers_with_more_than_a_weight_is_left_out(more):
    norm = LlamaRMSNorm(WIDTH)
    norm.more = more
    assert "there is no rule for its class" in reason(norm)


def test_a_subclass_of_timms_is_known_by_the_forward_that_it_has():
    inherited = type("LayerNorm2dNoBias", (LayerNorm2d,), {"__module__": "timm.models.metaformer"})
    own = type("LayerNorm2d", (LayerNorm2d,), {"__module__": "timm.models.other", "forward": lambda self, x: x})
    assert reason(own(WIDTH)) == "it is a subclass of LayerNorm, whose forward may differ; stn.converts adds a rule"
    tuned = stn.convert(nn.Sequential(inherited(WIDTH, bias=False)), quiet=True)
    assert [entry.reason for entry in tuned.tuned_hyperparameters.report] == [None]


def test_fast_norms_of_timm_are_left_out():
    norm = LayerNorm(WIDTH)
    norm._fast_norm = True
    assert "timm's fast norm" in reason(norm)


def test_a_rule_of_your_own_comes_first(monkeypatch):
    kind, seen = type("MixingRMSNorm", (Mixing,), {"__module__": "transformers.models.own"}), []
    monkeypatch.setitem(RULES, kind, lambda module, context: seen.append(context.name))
    stn.convert(nn.Sequential(kind(WIDTH)), quiet=True)
    assert seen == ["0"]
