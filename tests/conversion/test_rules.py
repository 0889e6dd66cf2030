"""Rules of your own, and those for modules of timm and transformers, whose classes are imitated here."""

import pytest
import torch
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.conversion.rules import RULES


class Scale(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features))

    def forward(self, x):
        return x * self.weight


class TunedScale(Converted, Scale):
    def effective(self, h):
        return self.weight + (h @ self.weight_gate.T) * self.response_weight

    def forward(self, x):
        return x * self.effective(self.response(self.weight))

    def folded(self, response):
        return {"weight": self.effective(response)}


@pytest.fixture
def rule():
    before = dict(RULES)

    @stn.converts(Scale)
    def convert_scale(module, context):
        context.add_response(module)
        context.become(module, TunedScale)

    yield convert_scale
    RULES.clear()
    RULES.update(before)


def test_a_module_of_your_own_is_converted_by_your_rule_and_folded(rule):
    model, x = nn.Sequential(Scale(3)), torch.randn(4, 3)
    want = model(x)
    tuned = stn.convert(model, quiet=True).eval()
    assert torch.equal(tuned(x), want)
    with torch.no_grad():
        tuned[0].response_weight.normal_()
        tuned.tuned_hyperparameters.location.add_(1.0)
    hyper = sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        rows = tuned(x)
    assert torch.equal(rows, x * (tuned[0].weight + hyper.response * tuned[0].response_weight))
    result = stn.fold(tuned)
    assert type(result[0]) is Scale
    assert relative_error(result(x), tuned(x)) < 1e-6
    assert relative_error(result(x), want) > 1e-3


def test_without_the_rule_it_is_left_out():
    tuned = stn.convert(nn.Sequential(Scale(3), nn.Linear(3, 3)), quiet=True)
    assert "there is no rule for its class; stn.converts adds a rule" in tuned.tuned_hyperparameters.report[1].reason


def test_a_rule_gets_the_hyperparameter_that_dropouts_names(rule):
    given = []
    stn.converts(Scale)(lambda module, context: given.append(context) or rule(module, context))
    space = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.2)])
    model = nn.Sequential(nn.Linear(3, 3), Scale(3))
    stn.convert(model, space, dropouts={"1": "rate"}, response_rank=3, example_dims={"1": 1}, quiet=True)
    (context,) = given
    assert (context.name, context.hyperparameter, context.response_rank, context.example_dim) == ("1", "rate", 3, 1)
    assert context.tuned is model.tuned_hyperparameters
    assert next(context.streams) == 1


def test_only_classes_of_modules_have_rules():
    with pytest.raises(TypeError, match=r"converts: the class must be a subclass of torch\.nn\.Module, got"):
        stn.converts(Scale(3))


class DropPath(nn.Module):
    """timm.layers.DropPath"""

    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        raise AssertionError("the plain forward")


class Conv1D(nn.Module):
    """transformers.pytorch_utils.Conv1D"""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.setattr(DropPath, "__module__", "timm.layers.drop")
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")


@pytest.mark.usefixtures("libraries")
def test_drop_path_drops_all_of_a_row_at_the_rate_of_its_example():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "drop_path1": DropPath(0.3)})
    tuned = stn.convert(model, quiet=True)
    own = tuned.tuned_hyperparameters
    assert own.space["drop_path1"].init == 0.3
    hyper = sampled(tuned, 4)
    with own.using(hyper):
        y = tuned["drop_path1"](torch.ones(4 * 500, 3, 2))
    rows = y.view(4, 500, 6)
    rate = hyper["drop_path1"].view(4, 1, 1)
    assert torch.equal(rows != 0, (rows[..., :1] != 0).expand_as(rows))
    assert torch.allclose(rows[rows != 0], (1 / (1 - rate)).expand_as(rows)[rows != 0])
    assert (rows[..., 0] == 0).float().mean(1).sub(rate.flatten()).abs().max() < 0.08
    result = stn.fold(tuned)
    assert type(result["drop_path1"]) is DropPath
    assert result["drop_path1"].drop_prob == own.values()["drop_path1"]


@pytest.mark.usefixtures("libraries")
def test_drop_path_that_does_not_scale_is_left_out():
    tuned = stn.convert(nn.ModuleList([nn.Linear(2, 2), DropPath(0.3, scale_by_keep=False)]), quiet=True)
    assert "scale_by_keep" in tuned.tuned_hyperparameters.report[1].reason


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("response_rank", [2, None])
def test_a_transposed_linear_layer_is_a_linear_layer(response_rank):
    torch.manual_seed(0)
    transposed, linear = Conv1D(12, 6).double(), nn.Linear(6, 12).double()
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.T)
        linear.bias.copy_(transposed.bias)
    ours, theirs = (converted(nn.Sequential(one), response_rank=response_rank) for one in (transposed, linear))
    with torch.no_grad():
        for name, parameter in theirs[0].named_parameters():
            other = getattr(ours[0], name)
            turned = name in ("weight", "response_projection") or (response_rank is None and name == "response_weight")
            other.copy_(parameter.T if turned else parameter)
    x, decay = torch.randn(8, 3, 6).double(), torch.rand(4)
    with ours.tuned_hyperparameters.using(sampled(ours)), theirs.tuned_hyperparameters.using(sampled(theirs)):
        assert relative_error(ours(x), theirs(x)) < 1e-12
    penalties = [one[0].weight_decay_penalty(sampled(one), decay) for one in (ours, theirs)]
    assert relative_error(*penalties) < 1e-12
    result = stn.fold(ours.eval())
    assert type(result[0]) is Conv1D
    assert relative_error(result(x), theirs.eval()(x)) < 1e-12


@pytest.mark.usefixtures("libraries")
def test_stochastic_depth_of_transformers_is_that_of_timm(monkeypatch):
    kind = type("SwinDropPath", (DropPath,), {"__module__": "transformers.models.swin.modeling_swin"})
    tuned = stn.convert(nn.ModuleDict({"linear": nn.Linear(2, 2), "drop_path": kind(0.3)}), quiet=True)
    assert tuned.tuned_hyperparameters.space["drop_path"].init == 0.3
    with tuned.tuned_hyperparameters.using(sampled(tuned, 4)):
        tuned["drop_path"](torch.ones(4, 2))


def test_other_stochastic_depth_is_listed():
    kind = type("StochasticDepth", (DropPath,), {})
    tuned = stn.convert(nn.ModuleList([nn.Linear(2, 2), kind(0.3)]), quiet=True)
    assert "there is no rule for its class" in tuned.tuned_hyperparameters.report[1].reason


def test_a_rule_may_use_a_hyperparameter_that_is_no_rate(rule):
    space = stn.HyperparameterSpace([stn.Hyperparameter("strength", low=0.0, init=2.0)])
    assert stn.convert(nn.Sequential(Scale(3)), space, quiet=True)[0].tuned.space == space


@pytest.mark.parametrize("halfway", [False, True])
def test_a_rule_that_fails_leaves_the_model_as_it_was(rule, halfway):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3), Scale(3))
    attributes = [{*module.__dict__} for module in model.modules()]
    before = {name: type(module) for name, module in model.named_modules()}, list(model.state_dict())

    @stn.converts(Scale)
    def failing(module, context):
        if halfway:
            context.add_response(module)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        stn.convert(model, quiet=True)
    assert before == ({name: type(module) for name, module in model.named_modules()}, list(model.state_dict()))
    assert attributes == [{*module.__dict__} for module in model.modules()]
    assert model[1].p == 0.3
    stn.convert(model, exclude="2", quiet=True)
