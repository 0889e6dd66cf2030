"""Passes of SelfTuner, for loops with their own backward, zero_grad and step: the numbers are those of its steps."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from torch import nn
from torch.utils.checkpoint import checkpoint

import stn_fast as stn
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.parameters import is_gate, is_response

EXAMPLES = 13


def batch(seed, examples=EXAMPLES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 6, generator=generator), torch.randint(4, (examples,), generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 4))


def without_statistics():
    model = network()
    model[1] = nn.Identity()
    return model


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def tuner_of(model=None, loss=None, **options):
    """With perturbations so wide that gradients of the response are divided."""
    tuned = respond(stn.convert(model or network(), quiet=True))
    tuned.tuned_hyperparameters.raw_scale.fill_(2.5)
    return stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9), loss, **options)


def train(tuner, number, passes=(False, True), clip=1.0, scaler=None):
    """A training step by passes."""
    (x, y), optimizer = batch(number), tuner.method.optimizer
    for antithetic in passes:
        with tuner.training(len(x), antithetic=antithetic):
            loss = (F.cross_entropy(tuner.model(x), y) + tuner.penalty()) / len(passes)
            (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip is not None:
        nn.utils.clip_grad_norm_(tuner.model.parameters(), clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def validate(tuner, number):
    x, y = batch(100 + number)
    with tuner.validating(len(x)):
        loss = F.cross_entropy(tuner.model(x), y)
    return tuner.hyper_step(loss)


def assert_same(one, other):
    """All numbers that the next step depends on are equal, bit for bit."""
    for mine, theirs in zip(*(copy.deepcopy(tuner.state_dict()) for tuner in (one, other)), strict=True):
        assert mine == theirs
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (one.draws, one.trained, one.validated) == (other.draws, other.trained, other.validated)


# Numbers


@pytest.mark.parametrize(
    ("antithetic", "clip", "tune_scales"), [(True, 1.0, True), (True, 0.1, False), (False, None, True)]
)
def test_passes_are_the_steps_of_the_tuner_bit_for_bit(antithetic, clip, tune_scales):
    options = dict(antithetic=antithetic, clip=clip, tune_scales=tune_scales, seed=5)
    steps, passes = tuner_of(loss=F.cross_entropy, **options), tuner_of(**options)
    for number in range(4):
        steps.train_step(batch(number))
        train(passes, number, (False, True) if antithetic else (False,), clip)
        assert_same(passes, steps)
        assert torch.equal(steps.valid_step(batch(100 + number)), validate(passes, number))
        assert_same(passes, steps)
    assert steps.history == passes.history


@pytest.mark.parametrize("model", [network, Checkpointed])
def test_each_part_of_an_accumulated_batch_has_a_draw_of_its_own(model):
    """Against gradients through `using`, and the division of those of R and r written out."""
    tuner = tuner_of(model(), seed=3)
    reference, parts = copy.deepcopy(tuner.model), [batch(0), batch(1, 5)]
    before = {name: parameter.detach().clone() for name, parameter in tuner.model.named_parameters()}
    for x, y in parts:
        with tuner.training(len(x)):
            (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    own, squares = reference.tuned_hyperparameters, []
    for number, (x, y) in enumerate(parts):
        hyper = own.space.sample(own.location, own.raw_scale, batch_size=len(x), seed=3, step=number)
        squares.append(hyper.response.T @ hyper.response / len(x))
        with own.using(hyper):
            loss = F.cross_entropy(reference(x), y)
            for layer in reference.modules():
                if isinstance(layer, nn.Linear):
                    loss = loss + layer.weight_decay_penalty(hyper, hyper["weight_decay"])
            loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in tuner.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-7)
    tuner.method.optimizer.step()
    moments, named = sum(squares) / 2, dict(reference.named_parameters())
    for name, parameter in tuner.model.named_parameters():
        change = -0.05 * gradients[name]
        if is_response(name) and not is_gate(name) and "projection" not in name:
            gate = named[name.replace("response_weight", "weight_gate").replace("response_bias", "bias_gate")]
            size = ((gate @ moments) * gate).sum(1).clamp(min=1)
            assert size.max() > 2
            change = change / size.view(-1, *[1] * (change.ndim - 1))
        torch.testing.assert_close(parameter, before[name] + change, rtol=1e-5, atol=1e-7)
    assert (tuner.draws, tuner.trained) == (2, 1)


def test_a_loss_scaled_by_a_grad_scaler_gives_the_same_steps():
    plain, scaled = tuner_of(), tuner_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(3):
        train(plain, number)
        train(scaled, number, scaler=scaler)
        validate(plain, number)
        validate(scaled, number)
    assert_same(plain, scaled)


def test_passes_whose_gradients_a_grad_scaler_refused_do_not_count():
    (x, y), tuner, other = batch(0), tuner_of(without_statistics()), tuner_of(without_statistics())
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), tuner.method.optimizer
    before = [parameter.detach().clone() for parameter in tuner.model.parameters()]
    with tuner.training(EXAMPLES):
        scaler.scale(F.cross_entropy(tuner.model(x), y) * math.inf + tuner.penalty()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(map(torch.equal, tuner.model.parameters(), before))
    other.draws = 1
    for one in (tuner, other):
        train(one, 1)
    assert_same(tuner, other)
    assert tuner.trained == 1


def test_passes_before_a_training_step_do_not_change_it():
    (x, y), tuner, other = batch(0), *(tuner_of(without_statistics(), F.cross_entropy) for _ in range(2))
    with tuner.training(EXAMPLES):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    other.draws = 1
    for one in (tuner, other):
        one.train_step(batch(1))
    assert_same(tuner, other)
    assert tuner.trained == 1


def test_a_wrapped_optimizer_divides_gradients_of_the_response_too():
    class Wrapper(torch.optim.Optimizer):
        """As that of Accelerate."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)

        def step(self, closure=None):
            self.optimizer.step(closure)

        def zero_grad(self, set_to_none=False):
            self.optimizer.zero_grad(set_to_none=set_to_none)

        def state_dict(self):
            return self.optimizer.state_dict()

    plain, tuned = tuner_of(), respond(stn.convert(network(), quiet=True))
    tuned.tuned_hyperparameters.raw_scale.fill_(2.5)
    wrapped = stn.SelfTuner(tuned, Wrapper(torch.optim.SGD(tuned.parameters(), lr=0.05, momentum=0.9)))
    for number in range(2):
        train(plain, number)
        train(wrapped, number)
    assert_same(plain, wrapped)


def test_the_penalty_is_that_of_the_pass():
    tuner = tuner_of()
    with tuner.training(EXAMPLES):
        tuner.model(batch(0)[0])
        hyper = tuner.model.tuned_hyperparameters.current
        penalty = tuner.penalty()
    want = 0.0
    for layer in (tuner.model[0], tuner.model[4]):
        response = layer.gated_parameters.whole_response
        weights = layer.weight + (hyper.response @ layer.weight_gate.T)[:, :, None] * response
        want += (0.5 * hyper["weight_decay"] * weights.square().sum((1, 2))).mean()
    torch.testing.assert_close(penalty, want)
    assert penalty > 0


def test_the_penalty_is_0_in_a_space_without_weight_decay():
    space = stn.HyperparameterSpace([stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3)])
    tuned = stn.convert(network(), space, quiet=True)
    tuner = stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1))
    with tuner.training(EXAMPLES):
        tuned(batch(0)[0])
        assert tuner.penalty() == 0


# What passes leave behind


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["training", "validating"])
def test_an_error_inside_a_pass_restores_everything(kind):
    tuner = tuner_of()
    own = tuner.model.tuned_hyperparameters
    tuner.model[1].eval()
    tuner.model[4].bias.requires_grad_(False)

    def state():
        modes = [module.training for module in tuner.model.modules()]
        wanted = [parameter.requires_grad for parameter in tuner.model.parameters()]
        return modes, wanted, own.current

    def stopped(kind):
        with getattr(tuner, kind)(EXAMPLES):
            assert tuner.model.training == (kind == "training")
            assert any(state()[1]) == (kind == "training")
            assert own.current is not None
            raise Stop

    for training in (True, False):
        tuner.model.train(training)
        before = state()
        with pytest.raises(Stop):
            stopped(kind)
        assert state() == before
    train(tuner, 0)
    validate(tuner, 0)


def test_an_error_inside_an_antithetic_pass_restores_running_statistics():
    tuner, (x, _) = tuner_of(), batch(0)
    with tuner.training(EXAMPLES):
        tuner.model(x)
        tuner.penalty()
    before = tuner.model[1].running_mean.clone()

    def stopped():
        with tuner.training(EXAMPLES, antithetic=True):
            tuner.model(x)
            raise Stop

    with pytest.raises(Stop):
        stopped()
    assert torch.equal(tuner.model[1].running_mean, before)


# Errors


def test_passes_may_not_be_nested():
    tuner = tuner_of(loss=F.cross_entropy)
    inside = {
        "training": lambda: tuner.training(EXAMPLES).__enter__(),
        "validating": lambda: tuner.validating(EXAMPLES).__enter__(),
        "train_step": lambda: tuner.train_step(batch(0)),
        "valid_step": lambda: tuner.valid_step(batch(0)),
        "hyper_step": lambda: tuner.hyper_step(torch.zeros(())),
    }
    for call, enter in inside.items():
        with tuner.training(EXAMPLES):
            tuner.model(batch(0)[0])
            tuner.penalty()
            with pytest.raises(RuntimeError, match=rf"{call}: the pass `with tuner\.training\(\.\.\.\)` is still open"):
                enter()
    train(tuner, 0)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True], ids=str)
def test_wrong_sizes_are_named(size):
    for kind in ("training", "validating"):
        tuner = tuner_of()
        with pytest.raises(ValueError, match=f"{kind}: batch_size must be an int >= 1"):
            getattr(tuner, kind)(size).__enter__()
        assert tuner.draws == 0


def test_a_size_other_than_that_of_the_input_is_an_error_of_the_layer():
    tuner, message = tuner_of(), r"0 \(Linear\): dimension 0 of its input \(13, 6\) must count the 12 examples"
    with pytest.raises(ValueError, match=message), tuner.training(12):
        tuner.model(batch(0)[0])


def test_passes_without_gradients_are_an_error():
    tuner = tuner_of()
    for kind in ("training", "validating"):
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"{kind} computes gradients, but"):
            getattr(tuner, kind)(EXAMPLES).__enter__()
    with tuner.validating(EXAMPLES):
        loss = tuner.model(batch(0)[0]).sum()
    with torch.no_grad(), pytest.raises(RuntimeError, match="hyper_step computes gradients, but"):
        tuner.hyper_step(loss)


def test_only_a_draw_that_has_not_been_repeated_can_be():
    tuner, x = tuner_of(), batch(0)[0]

    def enter(size, antithetic):
        with tuner.training(size, antithetic=antithetic):
            tuner.model(x)
            tuner.penalty()

    with pytest.raises(RuntimeError, match="antithetic=True repeats the draw of the pass before, once"):
        enter(EXAMPLES, True)
    enter(EXAMPLES, False)
    with pytest.raises(ValueError, match="antithetic=True needs the examples of the pass before, 13"):
        enter(12, True)
    enter(EXAMPLES, True)
    with pytest.raises(RuntimeError, match="the pass before, once"):
        enter(EXAMPLES, True)
    with pytest.raises(ValueError, match="antithetic must be True or False"):
        enter(EXAMPLES, "no")
    assert tuner.draws == 1


@pytest.mark.parametrize("inside", ["validating", None])
def test_the_penalty_belongs_to_training(inside):
    tuner = tuner_of()
    wrong = pytest.raises(RuntimeError, match="penalty: it belongs to the training loss")
    with tuner.validating(EXAMPLES) if inside else nullcontext(), wrong:
        tuner.penalty()


def test_a_loss_without_the_penalty_is_an_error():
    tuner, (x, y) = tuner_of(), batch(0)
    with pytest.raises(ValueError, match=r"add tuner\.penalty\(\) to the loss"), tuner.training(EXAMPLES):
        F.cross_entropy(tuner.model(x), y).backward()


def test_a_hyperparameter_that_is_not_used_is_named():
    model = network()
    model.forward = lambda x: model[4](model[0](x))
    tuner = tuner_of(model)
    with pytest.raises(ValueError, match="looks up 'dropout'"), tuner.training(EXAMPLES):
        (model(batch(0)[0]).sum() + tuner.penalty()).backward()


@pytest.mark.parametrize("tune_scales", [True, False])
def test_a_loss_that_does_not_depend_on_hyperparameters_is_refused(tune_scales):
    tuner, (x, y) = tuner_of(tune_scales=tune_scales), batch(0)
    before = tuner.method.location.detach().clone()
    with tuner.training(EXAMPLES):
        of_training = F.cross_entropy(tuner.model(x), y) + tuner.penalty()
    with torch.no_grad():
        of_evaluation = F.cross_entropy(tuner.model.eval()(x), y)
    for loss in (of_training, of_evaluation):
        with pytest.raises(RuntimeError, match="does not depend on the hyperparameters: compute it from outputs"):
            tuner.hyper_step(loss)
    with tuner.validating(EXAMPLES):
        of_each = F.cross_entropy(tuner.model(x), y, reduction="none")
    with pytest.raises(TypeError, match=r"hyper_step: the loss must be a tensor of one number.*got a tensor \(13,\)"):
        tuner.hyper_step(of_each)
    with pytest.raises(TypeError, match="got float"):
        tuner.hyper_step(0.5)
    assert torch.equal(tuner.method.location, before)
    assert (tuner.validated, tuner.history) == (0, [])


def test_the_loss_of_a_step_must_depend_on_hyperparameters_too():
    tuner = tuner_of(loss=lambda output, targets: output.detach().mean())
    with pytest.raises(RuntimeError, match="validation loss does not depend on the hyperparameters"):
        tuner.valid_step(batch(0))
    assert tuner.draws == 0


def test_a_validation_loss_that_is_not_finite_changes_nothing():
    tuner, (x, y) = tuner_of(), batch(0)
    before = tuner.method.location.detach().clone()
    with tuner.validating(EXAMPLES):
        loss = F.cross_entropy(tuner.model(x), y) * math.inf
    with pytest.raises(NonFiniteError):
        tuner.hyper_step(loss)
    assert torch.equal(tuner.method.location, before)
    assert tuner.validated == 0


def test_the_step_of_the_hyperparameters_may_be_inside_for_checkpointing():
    plain, checkpointed = tuner_of(), tuner_of(Checkpointed())
    x, y = batch(0)
    for tuner in (plain, checkpointed):
        with tuner.validating(EXAMPLES):
            tuner.hyper_step(F.cross_entropy(tuner.model(x), y))
    assert torch.equal(plain.method.location, checkpointed.method.location)


def test_steps_need_a_loss():
    tuner = tuner_of()
    for step in (tuner.train_step, tuner.valid_step):
        with pytest.raises(TypeError, match=r"steps need a loss, SelfTuner\(model, optimizer, loss\)"):
            step(batch(0))
