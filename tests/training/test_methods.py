"""Methods: which tensors each kind of step may move, against plain torch where there is a plain counterpart."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from own_batches import Sum, Summing, summed_loss
from random_response import respond
from torch.utils._pytree import tree_map

from stn_fast.data import Split
from stn_fast.hyperparameter import SCALE_BOUNDS
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.layers import HyperLSTM, PerExampleNoise
from stn_fast.models import mlp
from stn_fast.training.methods import FixedHyperparameters, SelfTuning, is_response
from stn_fast.training.task import classification_loss, decayed_classification_loss

SPACE = HyperparameterSpace(
    [
        Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
        Hyperparameter("weight_decay", low=0.0, init=1e-2),
    ]
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return respond(mlp(SPACE, (6, 16, 4)))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return Split(torch.randn(32, 6, generator=generator), torch.randint(4, (32,), generator=generator))


def self_tuning(model, **options):
    return SelfTuning(model, SPACE, decayed_classification_loss, classification_loss, **options)


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before, model):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def test_a_training_step_moves_every_weight_and_no_hyperparameter(model, batch):
    method = self_tuning(model)
    before, location, raw_scale = snapshot(model), method.location.clone(), method.raw_scale.clone()
    method.train_step(batch, 0)
    assert moved(before, model) == set(before)
    assert torch.equal(method.location, location)
    assert torch.equal(method.raw_scale, raw_scale)
    assert method.location.grad is None


def test_a_validation_step_moves_location_and_scale_and_touches_no_weight(model, batch):
    method = self_tuning(model)
    method.train_step(batch, 0)
    before, location, raw_scale = snapshot(model), method.location.detach().clone(), method.raw_scale.detach().clone()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    method.valid_step(batch, 1)
    assert moved(before, model) == set()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
        assert parameter.requires_grad
    assert (method.location != location).all()
    assert (method.raw_scale != raw_scale).all()


def test_a_validation_step_uses_no_dropout_and_no_penalty(model, batch):
    method = self_tuning(model, entropy_weight=0.0)
    hyper = SPACE.sample(method.location.detach(), method.raw_scale.detach(), batch_size=32, seed=0, step=5)
    expected = F.cross_entropy(model.eval()(batch.inputs, hyper), batch.targets)
    model.train()
    torch.testing.assert_close(method.valid_step(batch, 5), expected)


def test_the_entropy_alone_widens_a_scale_that_the_loss_does_not_see(model, batch):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.zero_()
    method = self_tuning(model, entropy_weight=1e-3)
    before = method.scales()
    method.valid_step(batch, 0)
    assert (method.scales() > before).all()
    assert torch.equal(method.location, SPACE.initial_state()[0])


def test_scales_stay_within_their_bounds(model, batch):
    method = self_tuning(model, entropy_weight=1e3, hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1e3))
    method.valid_step(batch, 0)
    bounded = method.raw_scale.detach().clone()
    assert torch.equal(bounded, SPACE.clamp_(bounded.clone()))


def test_untuned_scales_stay_and_validation_is_unperturbed(model, batch):
    method = self_tuning(model, tune_scales=False)
    expected = F.cross_entropy(model.eval()(batch.inputs, method.unperturbed(32)), batch.targets)
    raw_scale, location = method.raw_scale.clone(), method.location.detach().clone()
    torch.testing.assert_close(method.valid_step(batch, 0), expected)
    assert torch.equal(method.raw_scale, raw_scale)
    assert (method.location != location).all()


def test_rescaled_perturbations_are_as_wide_as_asked(model, batch):
    method = self_tuning(model, tune_scales=False)
    first = method.scales().clone()
    for factor in (0.5, 2.0):
        method.rescale(factor)
        torch.testing.assert_close(method.scales(), factor * first)
    low, high = SCALE_BOUNDS
    for factor, bound in ((1e-6, low), (1e6, high)):
        method.rescale(factor)
        torch.testing.assert_close(method.scales(), torch.full_like(first, bound))


def test_rescaling_refuses_a_tuned_scale_and_a_wrong_factor(model):
    with pytest.raises(RuntimeError, match=r"rescale: the scales are tuned.*tune_scales=False"):
        self_tuning(model).rescale(0.5)
    for wrong in (0, -1.0, math.nan, "half"):
        with pytest.raises(ValueError, match="rescale: factor must be"):
            self_tuning(model, tune_scales=False).rescale(wrong)


def test_freezing_holds_hyperparameters_but_trains_the_response(model, batch):
    method = self_tuning(model, freeze=True)
    before, location = snapshot(model), method.location.detach().clone()
    method.train_step(batch, 0)
    assert moved(before, model) == set(before)
    assert torch.equal(method.location, location)
    assert not method.tunes
    with pytest.raises(RuntimeError, match="call only train_step"):
        method.valid_step(batch, 1)


def test_a_frozen_run_still_perturbs(model, batch):
    frozen = self_tuning(copy.deepcopy(model), freeze=True)
    tuned = self_tuning(model)
    assert torch.equal(frozen.train_step(batch, 3), tuned.train_step(batch, 3))


def test_fixed_hyperparameters_leave_the_response_out(model, batch):
    before = snapshot(model)
    method = FixedHyperparameters(model, SPACE, decayed_classification_loss)
    method.train_step(batch, 0)
    plain = {name for name in before if not is_response(name)}
    assert moved(before, model) == plain
    assert all(p.grad is None for name, p in model.named_parameters() if name not in plain)
    with pytest.raises(RuntimeError, match="does not tune"):
        method.valid_step(batch, 1)


def test_fixed_hyperparameters_leave_an_lstms_response_out_too(batch):
    """Its parameters are those of torch.nn.LSTM; what is named beside them is the response."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = HyperLSTM(6, 4, 2, bidirectional=True, num_hyperparameters=len(SPACE))

        def forward(self, x, hyper):
            return self.lstm(x[None], hyper)[0][0]

    torch.manual_seed(0)
    model = Network()
    before = snapshot(model)
    FixedHyperparameters(model, SPACE, decayed_classification_loss, allow_unused=True).train_step(batch, 0)
    plain = torch.nn.LSTM(6, 4, 2, bidirectional=True)
    own = {f"lstm.{name}" for name, _ in plain.named_parameters()}
    assert moved(before, model) == own
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == own


def test_fixed_hyperparameters_without_dropout_are_plain_torch_training(batch):
    space = HyperparameterSpace([Hyperparameter("weight_decay", low=0.0, init=1e-2, response="raw")])
    torch.manual_seed(0)
    model = mlp(space, (6, 16, 4))
    weights = [copy.deepcopy(layer.weight) for layer in model.layers]
    biases = [copy.deepcopy(layer.bias) for layer in model.layers]
    plain = [{"params": weights, "weight_decay": 1e-2}, {"params": biases}]
    optimizer = torch.optim.SGD(plain, lr=0.05, momentum=0.9)
    method = FixedHyperparameters(model, space, decayed_classification_loss)
    for step in range(5):
        method.train_step(batch, step)
        hidden = F.relu(F.linear(batch.inputs, weights[0], biases[0]))
        optimizer.zero_grad()
        F.cross_entropy(F.linear(hidden, weights[1], biases[1]), batch.targets).backward()
        optimizer.step()
    for layer, weight, bias in zip(model.layers, weights, biases, strict=True):
        torch.testing.assert_close(layer.weight, weight)
        torch.testing.assert_close(layer.bias, bias)


def test_steps_draw_by_number_not_by_history(model, batch):
    again = copy.deepcopy(model)
    one, other = self_tuning(model), self_tuning(again)
    one.train_step(batch, 0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one.train_step(batch, 1), other.train_step(batch, 1))
    assert torch.equal(one.valid_step(batch, 2), other.valid_step(batch, 2))
    assert torch.equal(one.location, other.location)


NOISY = HyperparameterSpace(
    [
        Hyperparameter("input_noise", low=0.0, init=0.3),
        Hyperparameter("input_dropout", low=0.0, high=0.9, init=0.3),
        Hyperparameter("weight_decay", low=0.0, init=1e-2, per_example=False),
    ]
)


def drawn(make, call, batch, first_example):
    """What a step draws for each example: its hyperparameters, its noise and its dropout."""
    torch.manual_seed(0)
    model, seen = mlp(NOISY, (6, 16, 4)), []

    def objective(model, batch, hyper):
        seen.extend([hyper.values, hyper.response])
        return decayed_classification_loss(model, batch, hyper)

    method = make(model, NOISY, objective)
    for layer in (model.noise, model.dropouts[0]):
        layer.register_forward_hook(lambda layer, given, outcome: seen.append(outcome))
    getattr(method, call)(batch, 7, first_example=first_example)
    return [each.detach() for each in seen]


def tuning(model, space, objective, **options):
    return SelfTuning(model, space, objective, objective, seed=3, antithetic=False, **options)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (tuning, "train_step"),
        (tuning, "valid_step"),
        (partial(tuning, tune_scales=False), "valid_step"),
        (partial(FixedHyperparameters, seed=3), "train_step"),
    ],
)
def test_two_halves_of_a_batch_draw_the_same_as_the_whole(batch, make, call):
    whole = drawn(make, call, batch, 0)
    halves = [drawn(make, call, Split(*(part[k : k + 16] for part in batch)), k) for k in (0, 16)]
    assert len(whole) == 4
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one, torch.cat([first, second]))


def test_batches_of_a_data_loader_are_accepted(model, batch):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=32)
    method = self_tuning(model)
    for pair in loader:
        assert method.train_step(pair, 0).isfinite()
        assert method.valid_step(pair, 1).isfinite()


def test_a_model_without_a_response_is_a_clear_error(batch):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 4)

        def forward(self, x, hyper):
            return self.linear(x)

    method = SelfTuning(Plain(), SPACE, classification_loss, classification_loss)
    with pytest.raises(RuntimeError, match=r"does not depend on the hyperparameters.*HyperLinear"):
        method.valid_step(batch, 0)


def test_a_user_s_regulariser_is_checked_for_its_stream_too(model):
    class Jitter(PerExampleNoise):
        """Derives from the layers that draw without being one of those that the package names."""

    class Counter(torch.nn.Module):
        stream = 3

    model.counter = Counter()
    self_tuning(model)
    model.jitter = Jitter("hidden_dropout_1", stream=3)
    with pytest.raises(ValueError, match=r"'dropouts\.1' and 'jitter' both draw from stream 3"):
        self_tuning(model)


def test_two_layers_with_the_same_stream_are_refused(model):
    model.again = copy.deepcopy(model.dropouts[1])
    for build in (self_tuning, lambda m: FixedHyperparameters(m, SPACE, classification_loss)):
        with pytest.raises(ValueError, match=r"'dropouts\.1' and 'again' both draw from stream 3"):
            build(model)


@pytest.mark.parametrize("kind", [SelfTuning, FixedHyperparameters])
def test_the_gradient_of_a_training_step_has_a_norm_of_at_most_one_unless_told_otherwise(model, batch, kind):
    objectives = [lambda *given: 1e4 * classification_loss(*given), classification_loss][
        : 2 if kind is SelfTuning else 1
    ]

    def norm(**options):
        method = kind(copy.deepcopy(model), SPACE, *objectives, allow_unused=True, **options)
        method.train_step(batch, 0)
        gradients = [p.grad for p in method.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    assert norm() == pytest.approx(1.0, rel=1e-3)
    assert norm(clip=None) > 100


def test_a_model_of_several_inputs_takes_them_from_the_batch(batch):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(SPACE, (6, 16, 4))

        def forward(self, x, mask, hyper):
            return self.net(x * mask, hyper)

    def by_place(model, batch, hyper):
        return F.cross_entropy(model(*batch.inputs, hyper), batch.targets)

    def by_name(model, batch, hyper):
        return F.cross_entropy(model(batch.inputs["x"], batch.inputs["mask"], hyper), batch.targets)

    (x, y), mask = batch, torch.ones(6)
    losses = []
    for objective, given in ((by_place, (x, mask, y)), (by_name, {"x": x, "mask": mask, "targets": y})):
        torch.manual_seed(0)
        method = SelfTuning(Two(), SPACE, objective, objective, allow_unused=True)
        losses.append((method.train_step(given, 0), method.valid_step(given, 1)))
    assert losses[0] == losses[1]


def test_numpy_arrays_are_accepted_as_a_batch(model, batch):
    one, other = self_tuning(copy.deepcopy(model)), self_tuning(model)
    arrays = {"inputs": batch.inputs.numpy(), "targets": batch.targets.numpy()}
    assert torch.equal(one.train_step(arrays, 0), other.train_step(batch, 0))
    assert torch.equal(one.valid_step(tuple(arrays.values()), 1), other.valid_step(batch, 1))


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_steps_with_gradients_switched_off_name_the_cause(model, batch, switch):
    method = self_tuning(model)
    for name in ("train_step", "valid_step"):
        with switch(), pytest.raises(RuntimeError, match=f"{name} computes gradients, but torch.no_grad or"):
            getattr(method, name)(batch, 0)


def test_a_training_loss_that_trains_nothing_is_named(model, batch):
    method = self_tuning(model.requires_grad_(False).requires_grad_(True))
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the training loss does not depend on any parameter that requires"):
        method.train_step(batch, 0)


@pytest.mark.parametrize(
    ("loss", "got"), [(1.5, "got float"), (torch.ones(4), r"got a tensor \(4,\)"), (None, "NoneType")]
)
def test_an_objective_that_returns_no_mean_is_named(model, batch, loss, got):
    method = SelfTuning(model, SPACE, lambda *given: loss, lambda *given: loss)
    for kind, step in (("training", method.train_step), ("validation", method.valid_step)):
        with pytest.raises(TypeError, match=f"the {kind} loss must be a tensor of one number.*{got}"):
            step(batch, 0)


@pytest.mark.parametrize("kind", [SelfTuning, FixedHyperparameters])
def test_a_hyperparameter_that_nothing_uses_is_an_error_that_names_it(batch, kind):
    """Its entropy alone would move it, and nobody would notice."""
    space = HyperparameterSpace(
        [
            Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
            Hyperparameter("hiden_dropout_2", low=0.0, high=0.9, init=0.3),
            Hyperparameter("weight_decay", low=0.0, init=0.1),
        ]
    )
    objectives = [classification_loss] * (2 if kind is SelfTuning else 1)
    model = mlp(space, (6, 16, 4))
    method = kind(model, space, *objectives)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"nothing uses 'hiden_dropout_2', 'weight_decay': no layer"):
        method.train_step(batch, 0)
    assert not moved(before, model)
    kind(model, space, *objectives, allow_unused=True).train_step(batch, 0)


def test_an_objective_that_looks_up_no_hyperparameter_is_warned_of_once(batch):
    """It may read hyper.values."""
    space = HyperparameterSpace([Hyperparameter("weight_decay", low=0.0, init=0.1)])
    method = SelfTuning(mlp(space, (6, 16, 4)), space, classification_loss, classification_loss)
    with pytest.warns(UserWarning, match=r"nothing uses 'weight_decay': .*allow_unused=True"):
        method.train_step(batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.train_step(batch, 1)


def test_slices_and_moved_batches_count_as_the_batch_that_they_are_of(batch):
    def halves(model, batch, hyper):
        ends = zip((hyper[:16], hyper[16:].to("cpu")), batch.inputs.split(16), batch.targets.split(16), strict=True)
        return sum(F.cross_entropy(model(x, part), y) for part, x, y in ends) + 0 * hyper["weight_decay"].sum()

    space = HyperparameterSpace(
        [
            Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
            Hyperparameter("weight_decay", low=0.0, init=0.1),
        ]
    )
    SelfTuning(mlp(space, (6, 16, 4)), space, halves, classification_loss).train_step(batch, 0)


def test_a_copy_of_a_batch_counts_as_the_batch(batch):
    """torch.func and tree_map make copies of what they are given."""

    def copying(model, batch, hyper):
        logits = model(batch.inputs, tree_map(torch.clone, hyper))
        return F.cross_entropy(logits, batch.targets) + 0 * hyper["weight_decay"].sum()

    space = HyperparameterSpace(
        [
            Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3),
            Hyperparameter("weight_decay", low=0.0, init=0.1),
        ]
    )
    SelfTuning(mlp(space, (6, 16, 4)), space, copying, classification_loss).train_step(batch, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_user_s_batch_type_keeps_the_state_that_an_objective_returns(model, batch):
    options = dict(allow_unused=True, skip_nonfinite=1, antithetic=False)
    method = SelfTuning(model, SPACE, summed_loss, summed_loss, **options)
    kept = Sum()
    losses = [
        method.train_step(Summing(*batch, kept), 0),
        method.valid_step(Summing(*batch, kept), 1),
        method.train_step(Summing(*batch, kept), 2),
    ]
    assert kept.value == sum(losses)
    for bad, take in enumerate((method.train_step, method.valid_step), start=1):
        take(Summing(batch.inputs / 0, batch.targets, kept), 2 * bad + 1)
        assert kept.undone == bad
        method.train_step(Summing(*batch, Sum()), 2 * bad + 2)


def test_an_antithetic_step_is_the_mean_over_opposite_perturbations_with_the_same_draws(model, batch):
    method = self_tuning(model, clip=None)
    reference, losses = copy.deepcopy(model), []
    for antithetic in (False, True):
        hyper = SPACE.sample(*SPACE.initial_state(), batch_size=32, seed=0, step=4, antithetic=antithetic)
        losses.append(decayed_classification_loss(reference, batch, hyper) / 2)
    sum(losses).backward()
    torch.testing.assert_close(method.train_step(batch, 4), sum(losses).detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_a_response_that_nothing_asks_for_gets_no_gradient_from_an_antithetic_step(batch):
    """The noise that the gradients of R and W share cancels; without the second pass, it is all that R learns from."""
    norms = {}
    for antithetic in (True, False):
        torch.manual_seed(0)
        model = mlp(SPACE, (6, 16, 4))  # as new, with R = 0
        options = dict(antithetic=antithetic, allow_unused=True, clip=None)
        method = SelfTuning(model.eval(), SPACE, classification_loss, classification_loss, **options)
        method._modes.resume = lambda: None  # no dropout, so that the loss does not depend on the hyperparameters
        method.train_step(batch, 0)
        norms[antithetic] = torch.stack([layer.response_weight.grad.norm() for layer in model.layers])
    assert (norms[True] < 1e-6 * norms[False]).all()


def test_the_first_pass_of_an_antithetic_step_is_differentiated_before_the_second_is_made(model, batch):
    """So that it needs the memory of one pass."""
    order = []

    def loss(model, batch, hyper):
        order.append("forward")
        logits = model(batch.inputs, hyper)
        logits.register_hook(lambda gradient: order.append("backward"))
        return F.cross_entropy(logits, batch.targets)

    SelfTuning(model, SPACE, loss, classification_loss, allow_unused=True).train_step(batch, 0)
    assert order == ["forward", "backward"] * 2
