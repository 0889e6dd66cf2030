"""Δ-STN: its steps against the definition, by torch.func on the reference operations, and against plain training."""

import copy
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from torch import nn
from torch.autograd import forward_ad

from stn_fast import models
from stn_fast.conversion.folding import tuned_in
from stn_fast.data import Split
from stn_fast.dispatch import use_backend
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.layers import HyperConv2d, HyperLinear, HyperLSTM, PerExampleDropout, PerExampleNoise
from stn_fast.models import mlp
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.linearised import Linearised
from stn_fast.training.methods import FixedHyperparameters
from stn_fast.training.parameters import hold_parameters, is_response
from stn_fast.training.task import classification_loss, decayed_classification_loss

pytestmark = pytest.mark.usefixtures("random_response")
BATCH = 5


def rates(*names, per_batch=(), **others):
    named = [Hyperparameter(name, init=0.2, low=0.0, high=0.9, per_example=name not in per_batch) for name in names]
    return HyperparameterSpace([*named, *others.values()])


def images(side, channels, dtype):
    x = torch.randn(BATCH, channels, side, side, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


SPACE = rates("hidden_dropout_1", weight_decay=Hyperparameter("weight_decay", low=0.0, init=1e-2))


class Attention(nn.Module):
    """A transformer block: gated projections, and torch's own norms, GELU and attention."""

    def __init__(self, n, rank):
        super().__init__()
        gated = dict(num_hyperparameters=n, response_rank=rank)
        self.norm, self.second_norm = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.out = HyperLinear(12, 36, **gated), HyperLinear(12, 12, **gated)
        self.up, self.down = HyperLinear(12, 24, **gated), HyperLinear(24, 12, **gated)
        self.dropout = PerExampleDropout("dropout", stream=1)

    def forward(self, x, hyper):
        q, k, v = self.qkv(self.norm(x), hyper).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        attended = F.softmax(q @ k.mT / 6**0.5, -1) @ v
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2), hyper), hyper)
        return x + self.down(F.gelu(self.up(self.second_norm(x), hyper)), hyper)


class Sequences(nn.Module):
    """A bidirectional LSTM, one that starts from the states of another, and a grouped and padded convolution."""

    def __init__(self, n, rank):
        super().__init__()
        gated = dict(num_hyperparameters=n, response_rank=rank)
        self.first = HyperLSTM(6, 5, bidirectional=True, **gated)
        self.second = HyperLSTM(10, 5, **gated)
        self.conv = HyperConv2d(4, 6, (2, 3), (1, 2), "valid", groups=2, padding_mode="reflect", **gated)
        self.noise = PerExampleNoise("dropout", stream=1)

    def forward(self, x, hyper):
        y, (h_n, c_n) = self.first(x.transpose(0, 1), hyper)
        y, (h_n, c_n) = self.second(self.noise(y, hyper, example_dim=1), hyper, (h_n[:1], c_n[1:]))
        rows = torch.cat([y.transpose(0, 1), h_n.transpose(0, 1), c_n.transpose(0, 1)], 1)
        return self.conv(rows[:, :8].unflatten(1, (4, 2)).contiguous(), hyper)


@pytest.fixture(autouse=True)
def small_alexnet(monkeypatch):
    monkeypatch.setattr(import_module("stn_fast.models.alexnet"), "HIDDEN", (40, 44))


def converted(network, space, rank):
    return respond(models.tuned(network, space, rank))


def networks(name, rank, dtype):
    """(space, model, its inputs)"""
    torch.manual_seed(0)
    if name == "mlp":
        whole = Hyperparameter("input_noise", init=1.5, low=0.0, high=4.0, integer=True)
        space = rates("input_dropout", "hidden_dropout_1", "hidden_dropout_2", input_noise=whole)
        return space, converted(models.plain_mlp((12, 20, 17, 7)), space, rank), (torch.randn(BATCH, 12, dtype=dtype),)
    if name == "alexnet":
        space = rates("conv_dropout", "fc_dropout_1", "last_dropout")
        return space, converted(models.alexnet(image_size=16), space, rank), (images(16, 3, dtype),)
    if "resnet" in name:
        space = rates("block_dropout", "last_dropout")
        module = import_module("stn_fast.models.resnet")
        small = (4, (4, 6), 1, 3, 10)  # stem, stages, blocks of each, channels, classes
        block = module.BasicBlock if name == "resnet" else module.PreActivationBlock
        return space, converted(module.ResNet(block, *small), space, rank), (images(9, 3, dtype),)
    if name == "language model":
        per_batch = ("embedding_dropout", "recurrent_dropout")
        space = rates("input_dropout", "hidden_dropout", "output_dropout", *per_batch, per_batch=per_batch)
        model = models.LanguageModel(30, 16, 16, 2)
        return space, converted(model, space, rank), (torch.randint(30, (6, BATCH)),)
    space = rates("dropout")
    if name == "transformer":
        return space, Attention(1, rank), (torch.randn(BATCH, 7, 12, dtype=dtype),)
    return space, Sequences(1, rank), (torch.randn(BATCH, 9, 6, dtype=dtype),)


def of_networks(test):
    names = ["mlp", "alexnet", "resnet", "pre-activation resnet", "language model", "transformer", "sequences"]
    ranks = pytest.mark.parametrize("rank", [None, 3], ids=["full", "low rank"])
    return pytest.mark.parametrize("name", names)(ranks(test))


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def response_gradients(model, outputs):
    """Of a loss that is not linear in the outputs, by name."""
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    named = {name: p for name, p in model.named_parameters() if is_response(name)}
    return dict(zip(named, torch.autograd.grad((outputs * weights).square().sum(), named.values()), strict=True))


def called(model, call, inputs, hyper):
    """``call`` of a model, with the hyperparameters that a converted one uses without being given them."""
    tuned = tuned_in(model)
    if tuned is None:
        return call(*inputs, hyper)
    with tuned.using(hyper):
        return call(*inputs)


def by_torch_func(model, inputs, hyper):
    """f(0) + J h by torch.func.jvp through the definitions of all operations."""

    def outputs(response):
        given = replace(hyper, response=response, calls={}, open_calls={})
        parameters = dict(model.named_parameters())
        return first(called(model, lambda *xs: torch.func.functional_call(model, parameters, xs), inputs, given))

    with use_backend("reference"):
        z, dz = torch.func.jvp(outputs, (torch.zeros_like(hyper.response),), (hyper.response,))
    return z + dz


def relative(found, expected):
    return (found.double() - expected.double()).norm() / expected.double().norm()


def linearised(model, inputs, hyper):
    return first(called(model, Linearised(model), inputs, hyper))


def compute(name, rank, *ways):
    """The outputs and response gradients of a network, {"outputs": …, name: …}, in each (function, dtype)."""
    space, model, inputs = networks(name, rank, torch.float64)
    location, raw_scale = space.initial_state()
    hyper = space.sample(location, raw_scale, batch_size=BATCH, seed=1, step=3, center=location)
    found = []
    for function, dtype in ways:
        model = copy.deepcopy(model).to(dtype)
        given = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        with hold_parameters([p for name, p in model.named_parameters() if not is_response(name)]):
            outputs = function(model, given, hyper)
            found.append({"outputs": outputs.detach()} | response_gradients(model, outputs))
    return found


@of_networks
def test_outputs_and_response_gradients_are_those_of_torch_func(name, rank):
    found, expected = compute(name, rank, (linearised, torch.float64), (by_torch_func, torch.float64))
    for part, numbers in expected.items():
        assert relative(found[part], numbers) < 1e-13, part


@of_networks
def test_in_float32_they_are_as_good_as_those_of_torch_func(name, rank):
    ways = (linearised, torch.float32), (by_torch_func, torch.float32), (by_torch_func, torch.float64)
    found, plain, expected = compute(name, rank, *ways)
    for part, numbers in expected.items():
        assert relative(found[part], numbers) < 2 * relative(plain[part], numbers) + 1e-6, part


# What the linearised model says about what it can't linearise


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, dy):
        return dy


class Clamp(nn.Module):
    def forward(self, x):
        return Clamped.apply(x)


class Clamping(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.clamp, self.layer = Clamp(), HyperLinear(3, 4, num_hyperparameters=size)

    def forward(self, x, hyper):
        return self.clamp(self.layer(x, hyper))


def test_a_module_without_a_tangent_is_named():
    space = rates("dropout")
    hyper = space.sample(*space.initial_state(), batch_size=2, seed=0, step=0)
    with pytest.raises(RuntimeError, match=r"'clamp' \(Clamp\) has no tangent.*jvp.*linearize=False"):
        Linearised(Clamping(1))(torch.ones(2, 3), hyper)


def test_other_errors_of_the_model_are_passed_on():
    space = rates("dropout")
    hyper = space.sample(*space.initial_state(), batch_size=2, seed=0, step=0)
    with pytest.raises(ValueError, match="HyperLinear: x must be"):
        Linearised(Clamping(1))(torch.ones(2, 5), hyper)


def test_a_model_that_does_not_respond_is_an_error():
    space = rates("dropout")
    hyper = space.sample(*space.initial_state(), batch_size=2, seed=0, step=0)
    with pytest.raises(RuntimeError, match="no output of the model changes"):
        Linearised(PerExampleDropout("dropout", stream=1))(torch.ones(2, 5), hyper)


def test_a_linearised_model_has_the_attributes_of_the_model():
    model = Clamping(1)
    assert Linearised(model).layer is model.layer
    with pytest.raises(AttributeError, match="nothing"):
        _ = Linearised(model).nothing


def linear_then(module):
    """A network with a module between two gated layers."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = (HyperLinear(*sizes, num_hyperparameters=2) for sizes in ((6, 8), (8, 4)))
            self.between = module

        def forward(self, x, hyper):
            return self.second(self.between(self.first(x, hyper)), hyper)

    return Network()


def test_compiled_modules_are_linearised_too():
    hyper = SPACE.sample(*SPACE.initial_state(), batch_size=3, seed=0, step=0)
    model = linear_then(nn.Tanh())
    for wrapped in (linear_then(torch.compile(nn.Tanh(), backend="eager")), torch.compile(model, backend="aot_eager")):
        assert torch.equal(Linearised(wrapped)(torch.ones(3, 6), hyper), Linearised(model)(torch.ones(3, 6), hyper))


class Detached(nn.Module):
    def forward(self, x):
        return forward_ad.unpack_dual(x).primal.tanh()


def test_what_cuts_tangents_is_an_error_in_the_first_response_step(batch):
    method = DeltaSelfTuning(
        linear_then(Detached()), SPACE, classification_loss, classification_loss, allow_unused=True
    )
    with pytest.raises(RuntimeError, match=r"no gradient to first\.response_weight, although the loss depends on its"):
        method.train_step(batch, 0)


def test_layers_that_are_not_used_are_none(batch):
    model = linear_then(nn.Tanh())
    model.unused = HyperLinear(2, 2, num_hyperparameters=2)
    DeltaSelfTuning(model, SPACE, classification_loss, classification_loss, allow_unused=True).train_step(batch, 0)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda y: y.square().mean(), "a single number.*return logits"),
        (lambda y: {"logits": y, "kept": {y}}, "returns a set"),
    ],
    ids=["a loss", "a set"],
)
def test_outputs_that_can_t_be_linearised_are_errors(returned, error):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = HyperLinear(3, 4, num_hyperparameters=2)

        def forward(self, x, hyper):
            return returned(self.layer(x, hyper))

    hyper = SPACE.sample(*SPACE.initial_state(), batch_size=2, seed=0, step=0)
    with pytest.raises((RuntimeError, TypeError), match=error):
        Linearised(Network())(torch.ones(2, 3), hyper)


def test_a_second_call_with_one_batch_draws_other_masks():
    space = rates("dropout")
    hyper = space.sample(*space.initial_state(), batch_size=BATCH, seed=0, step=0)
    model = Linearised(Attention(1, None))
    x = torch.randn(BATCH, 7, 12)
    assert not torch.equal(model(x, hyper), model(x, hyper))


def test_16_bit_outputs_are_added_in_float32(batch):
    model = mlp(SPACE, (6, 16, 4)).eval().bfloat16()
    hyper = SPACE.sample(*SPACE.initial_state(), batch_size=32, seed=0, step=0)
    assert Linearised(model)(batch.inputs.bfloat16(), hyper).dtype == torch.float32


# The steps


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Split(torch.randn(32, 6, generator=generator), torch.randint(4, (32,), generator=generator))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp(SPACE, (6, 16, 4))


def delta(model, **options):
    return DeltaSelfTuning(model, SPACE, decayed_classification_loss, classification_loss, **options)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_each_step_moves_its_own_parameters(model, batch):
    method = delta(model)
    names = set(dict(model.named_parameters()))
    response = {name for name in names if is_response(name)}
    before, location = snapshot(model), method.location.detach().clone()
    method.general_step(batch, 0)
    assert moved(before, model) == names - response
    before = snapshot(model)
    method.response_step(batch, 0)
    assert moved(before, model) == response
    assert torch.equal(method.location, location)
    before = snapshot(model)
    method.valid_step(batch, 1)
    assert moved(before, model) == set()
    assert (method.location != location).all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_training_step_is_the_general_and_then_the_response_step(model, batch):
    together, apart = delta(copy.deepcopy(model)), delta(model)
    for step in range(3):
        loss = apart.general_step(batch, step)
        apart.response_step(batch, step)
        assert torch.equal(together.train_step(batch, step), loss)
    assert moved(snapshot(together.model), apart.model) == set()


def test_general_steps_are_training_with_fixed_hyperparameters(model, batch):
    general, fixed = (
        delta(copy.deepcopy(model), seed=7),
        FixedHyperparameters(model, SPACE, decayed_classification_loss, seed=7 ^ (1 << 62)),
    )
    for step in range(3):
        assert torch.equal(general.general_step(batch, step), fixed.train_step(batch, step))


def test_the_response_step_regularises_at_the_perturbed_hyperparameters(model, batch):
    """Its loss, with dropout off: cross entropy of the linearised logits, and the decay of W + diag(s) R as it is."""
    method = delta(model, allow_unused=True, antithetic=False)
    for dropout in model.dropouts:
        dropout.eval()
    hyper = SPACE.sample(method.location.detach(), method.raw_scale.detach(), batch_size=32, seed=0, step=4,
        center=method.location.detach())  # fmt: skip
    with torch.no_grad():
        expected = F.cross_entropy(by_torch_func(model, (batch.inputs,), hyper), batch.targets)
        for layer in model.layers:
            weights = layer.weight + (hyper.response @ layer.weight_gate.T)[:, :, None] * layer.response_weight
            expected += (0.5 * hyper["weight_decay"] * weights.square().sum((1, 2))).mean()
    torch.testing.assert_close(method.response_step(batch, 4), expected)


def test_without_linearisation_the_response_step_uses_the_network_itself(model, batch):
    method = delta(model, linearize=False, antithetic=False)
    hyper = SPACE.sample(method.location.detach(), method.raw_scale.detach(), batch_size=32, seed=0, step=4,
        center=method.location.detach())  # fmt: skip
    expected = decayed_classification_loss(model, batch, hyper).detach()
    torch.testing.assert_close(method.response_step(batch, 4), expected)


def test_the_validation_step_is_not_linearised_and_is_centred(model, batch):
    method = delta(model, entropy_weight=0.0)
    with torch.no_grad():
        method.location += 0.3
    center = method.location.detach().clone()
    hyper = SPACE.sample(center, method.raw_scale.detach(), batch_size=32, seed=0, step=5, center=center)
    expected = F.cross_entropy(model.eval()(batch.inputs, hyper), batch.targets)
    torch.testing.assert_close(method.valid_step(batch, 5), expected)


def test_evaluations_use_the_plain_weights(model, batch):
    method = delta(model)
    with torch.no_grad():
        method.location += 0.3
        x = batch.inputs
        for i, layer in enumerate(model.layers):
            x = F.linear(x.relu() if i else x, layer.weight, layer.bias)
        assert torch.equal(model.eval()(batch.inputs, method.unperturbed(32)), x)


def test_both_views_of_a_batch_are_drawn_apart_and_again(model, batch):
    seen = []

    def loss(model, batch, hyper):
        seen.append(hyper)
        return decayed_classification_loss(model, batch, hyper)

    method = DeltaSelfTuning(model, SPACE, loss, classification_loss)
    method.train_step(batch, 3)
    method.train_step(batch, 3)
    masks = [model.dropouts[1](torch.ones(32, 16), replace(hyper, calls={})) != 0 for hyper in seen]
    general, response, antithetic = masks[:3]
    assert all(map(torch.equal, masks[:3], masks[3:]))
    assert 0.1 < (general != response).float().mean() < 0.9
    assert not torch.equal(response, antithetic)
    assert (response != antithetic).float().mean() < 0.2  # the same uniform numbers, at other rates


def test_halves_of_a_batch_draw_what_the_whole_one_draws(model, batch):
    losses = {}
    for first_example, rows in ((0, slice(0, 32)), (0, slice(0, 12)), (12, slice(12, 32))):
        method = delta(copy.deepcopy(model))
        losses[rows.start, rows.stop] = [
            step(Split(batch.inputs[rows], batch.targets[rows]), 2, first_example=first_example)
            for step in (method.response_step, method.general_step)
        ]
    for whole, one, other in zip(losses[0, 32], losses[0, 12], losses[12, 32], strict=True):
        torch.testing.assert_close(whole, (12 * one + 20 * other) / 32)


def test_states_are_restored_and_the_response_has_an_optimizer_of_its_own(model, batch):
    first = delta(copy.deepcopy(model), response_optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    second = delta(model, response_optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    first.train_step(batch, 0)
    first.valid_step(batch, 1)
    first.learning_rate = first.learning_rate / 4
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.response_optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)
    for method in (first, second):
        method.train_step(batch, 2)
    assert moved(snapshot(first.model), second.model) == set()
    with pytest.raises(ValueError, match="the state was saved with the optimizers"):
        delta(copy.deepcopy(model)).load_state_dict(first.state_dict())


def test_a_step_that_is_not_finite_changes_nothing(model, batch):
    method = delta(model, skip_nonfinite=1)
    before = snapshot(model)
    with pytest.warns(RuntimeWarning, match="the training loss is nan"):
        method.train_step(Split(batch.inputs * float("nan"), batch.targets), 0)
    assert moved(before, model) == set()
    assert method.skipped_steps == 1


def test_a_model_without_gated_layers_is_refused():
    with pytest.raises(ValueError, match="has no gated layers"):
        delta(nn.Linear(2, 2))


def test_running_statistics_are_those_of_general_steps(batch):
    def method():
        torch.manual_seed(0)
        return DeltaSelfTuning(
            linear_then(nn.BatchNorm1d(8)), SPACE, classification_loss, classification_loss, allow_unused=True
        )

    whole, general = method(), method()
    for step in range(3):
        whole.train_step(batch, step)
        general.general_step(batch, step)
    assert whole.model.between.num_batches_tracked == 3
    assert torch.equal(whole.model.between.running_mean, general.model.between.running_mean)


def test_steps_in_bf16_are_near_those_in_fp32(model, batch):
    one, other = delta(copy.deepcopy(model)), delta(model, precision="bf16")
    for step in range(3):
        torch.testing.assert_close(one.train_step(batch, step), other.train_step(batch, step), rtol=1e-2, atol=0)
    torch.testing.assert_close(one.response_step(batch, 3), other.response_step(batch, 3), rtol=1e-2, atol=0)
    torch.testing.assert_close(one.valid_step(batch, 4), other.valid_step(batch, 4), rtol=1e-2, atol=0)


def test_response_steps_that_are_never_finite_become_an_error(model, batch):
    method = delta(model, skip_nonfinite=1)
    with torch.no_grad():
        model.layers[0].response_weight.fill_(float("nan"))
    with pytest.warns(
        RuntimeWarning, match="of layers.0.weight_gate.* is not finite at response step|response loss is"
    ):
        method.train_step(batch, 0)
    with pytest.raises(NonFiniteError, match="response"):
        method.train_step(batch, 1)


def test_a_rate_of_0_can_be_raised_again(model):
    method = delta(model, response_optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    for rate in (0.0, 0.1):
        method.learning_rate = rate
    assert method.learning_rate == 0.1
    assert method.response_optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


def test_gates_of_other_modules_are_left_alone(model):
    model.other = nn.Module()
    model.other.weight_gate = nn.Parameter(torch.ones(3))
    delta(model)
    assert torch.equal(model.other.weight_gate, torch.ones(3))


def test_hyperparameters_can_be_frozen_or_their_scales_kept(model, batch):
    method = delta(copy.deepcopy(model), freeze=True)
    method.train_step(batch, 0)
    with pytest.raises(RuntimeError, match="call only train_step"):
        method.valid_step(batch, 1)
    method = delta(model, tune_scales=False)
    location, raw_scale = method.location.detach().clone(), method.raw_scale.clone()
    method.valid_step(batch, 1)
    assert (method.location != location).all()
    assert torch.equal(method.raw_scale, raw_scale)
