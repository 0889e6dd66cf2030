"""Hypergradients of an optimizer's hyperparameters, against closed forms and against torch's own optimizers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.layers import HyperLinear, PerExampleDropout
from stn_fast.training import finite
from stn_fast.training.batches import as_batch
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.methods import FixedHyperparameters
from stn_fast.training.one_pass import DECAY, MOMENTUM, RATE, OnePass

SPACE = HyperparameterSpace([Hyperparameter("dropout", init=0.2, low=0.0, high=0.9)])
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.8)
adam = partial(torch.optim.Adam, lr=0.02, betas=(0.8, 0.99), eps=1e-4)
frozen = partial(torch.optim.SGD, lr=0.0)


def half_mean_square(model, batch, hyper):
    return (model(batch.inputs, hyper) - batch.targets).square().sum(1).mean() / 2


class Linear(nn.Linear):
    def forward(self, inputs, hyper):
        return super().forward(inputs)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = HyperLinear(5, 7, num_hyperparameters=1), HyperLinear(7, 2, num_hyperparameters=1)
        self.dropout = PerExampleDropout("dropout", stream=1)

    def forward(self, inputs, hyper):
        return self.last(self.dropout(self.first(inputs, hyper).tanh(), hyper), hyper)


def batches():
    torch.manual_seed(3)
    return [(torch.randn(40, 5), torch.randn(40, 2)) for _ in range(2)]


def make(model, **options):
    given = dict(optimizer=sgd, hyper_optimizer=frozen, clip=None, weight_decay=0.3, allow_unused=True) | options
    return OnePass(model, SPACE, half_mean_square, half_mean_square, **given)


def hypergradient(method, train, valid):
    method.valid_step(valid, 1)
    method.train_step(train, 2)
    return method.location.grad


def test_with_many_terms_it_is_the_derivative_of_the_exact_minimum():
    # Without momentum, the weights converge to (H + decay)⁻¹ c, with H = XᵀX / N and c = XᵀT / N.
    (inputs, targets), (held_out, wanted) = batches()
    model = Linear(5, 2, bias=False)
    method = make(model, optimizer=partial(torch.optim.SGD, lr=0.5, momentum=1e-6), neumann_terms=200)
    for step in range(200):
        method.train_step((inputs, targets), step)
    found = hypergradient(method, (inputs, targets), (held_out, wanted))

    curvature = inputs.T @ inputs / 40
    decay = torch.tensor(method.space.values(method.location)[DECAY], requires_grad=True)
    exact = torch.linalg.solve(curvature + decay * torch.eye(5), inputs.T @ targets / 40)
    torch.testing.assert_close(model.weight.T, exact.detach(), rtol=1e-5, atol=1e-6)
    loss = (held_out @ exact - wanted).square().sum(1).mean() / 2
    (slope,) = torch.autograd.grad(loss, decay)
    torch.testing.assert_close(found[3], slope * -torch.expm1(-decay.detach()), rtol=1e-4, atol=0)  # softplus'
    assert found[:3].abs().max() < 1e-5 * found[3].abs()  # neither rate nor momentum matter at the minimum


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_it_is_the_neumann_series_of_the_optimizers_own_update(optimizer, clip):
    torch.manual_seed(0)
    train, valid = batches()
    method = make(Net().double(), optimizer=optimizer, neumann_terms=3, clip=clip)
    train, valid = ([part.double() for part in batch] for batch in (train, valid))
    for step in range(3):
        method.train_step(train, 10 + step)
    parameters = list(method._parameters)
    shapes = [parameter.shape for parameter in parameters]
    kept = copy.deepcopy(method.state_dict())

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    def after(weights, index=None, by=0.0):
        """Weights after the training step from ``weights``, as torch's optimizer makes it, with a location moved."""
        method.load_state_dict(copy.deepcopy(kept))
        with torch.no_grad():
            split = weights.split([shape.numel() for shape in shapes])
            for parameter, values, shape in zip(parameters, split, shapes, strict=True):
                parameter.copy_(values.view(shape))
            if index is not None:
                method.location[index] += by
        method._install()
        method.train_step(train, 2)
        return flat(parameters).detach().clone()

    start = flat(parameters).detach().clone()
    method.valid_step(valid, 1)
    towards = flat(method._validation_gradients[0])
    tiny = 1e-5
    if clip is not None:  # the factor of clipping is taken for constant, so the difference must not move it
        method.clip = None
        batch = as_batch(train, torch.device("cpu"))
        loss = half_mean_square(method.model, batch, method._at(batch_size=40, seed=0, step=2))
        norm = flat(torch.autograd.grad(loss, parameters)).norm()
        factor = clip / (norm + 1e-6)
        training = method.training_objective
        method.training_objective = lambda *given: training(*given) * factor
    directions = torch.eye(len(start)).double()
    columns = [(after(start + tiny * unit) - after(start - tiny * unit)) / (2 * tiny) for unit in directions]
    jacobian = torch.stack(columns, 1)  # of w - u, which is 1 - ∂u/∂w
    series = towards + towards @ jacobian + towards @ jacobian @ jacobian
    moved = torch.stack([(after(start, k, 1e-2) - after(start, k, -1e-2)) / 2e-2 for k in (1, 2, 3)])
    method.load_state_dict(copy.deepcopy(kept))
    if clip is not None:
        method.clip, method.training_objective = clip, training
    found = hypergradient(method, train, valid)
    torch.testing.assert_close(found[1:].double(), moved @ series, rtol=2e-3, atol=1e-7)
    assert found[0] == 0


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
def test_without_weight_decay_and_validation_it_trains_as_fixed_does(optimizer):
    torch.manual_seed(0)
    train, _ = batches()
    one_pass = make(Net(), optimizer=optimizer, weight_decay=1e-30)
    fixed = FixedHyperparameters(copy.deepcopy(one_pass.model), SPACE, half_mean_square, optimizer=optimizer, clip=None)
    for step in range(3):
        one_pass.train_step(train, step)
        fixed.train_step(train, step)
    for name, parameter in fixed.model.named_parameters():
        torch.testing.assert_close(one_pass.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)


def test_a_rate_that_is_too_low_rises():
    torch.manual_seed(0)
    (train, _), method = batches(), make(Net(), hyper_optimizer=partial(torch.optim.Adam, lr=0.05))
    method.learning_rate = 1e-3
    assert method.learning_rate == pytest.approx(1e-3)
    for cycle in range(20):
        method.valid_step(train, 6 * cycle)
        for step in range(5):
            method.train_step(train, 6 * cycle + step + 1)
    values = method.space.values(method.location)
    assert values[RATE] > 2e-3
    assert method.learning_rate == pytest.approx(values[RATE])
    assert method.optimizer.param_groups[0]["momentum"] == pytest.approx(values[MOMENTUM])
    assert values[MOMENTUM] > 0.8
    assert values["dropout"] == pytest.approx(0.2)


def test_a_state_between_validation_and_training_goes_on_exactly():
    train, valid = batches()
    torch.manual_seed(0)
    one = make(Net(), hyper_optimizer=partial(torch.optim.Adam, lr=0.05))
    torch.manual_seed(1)
    other = make(Net(), hyper_optimizer=partial(torch.optim.Adam, lr=0.05))
    one.train_step(train, 0)
    one.valid_step(valid, 1)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for method in (one, other):
        method.train_step(train, 2)
        method.train_step(train, 3)
    assert torch.equal(one.location, other.location)
    assert not torch.equal(one.location[1:], one.space.initial_state()[0][1:])
    for name, parameter in one.model.named_parameters():
        if "response" not in name and "gate" not in name:
            assert torch.equal(parameter, other.model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (partial(torch.optim.RMSprop, lr=0.1), "must be torch.optim.SGD or Adam, got RMSprop"),
        (partial(torch.optim.SGD, lr=0.0), "learning rate must be above 0 to be tuned"),
        (partial(torch.optim.SGD, lr=0.1, momentum=1.0), "momentum must be at least 0 and below 1, got 1"),
        (partial(sgd, nesterov=True), "must have nesterov=0 or False, got True"),
        (partial(sgd, weight_decay=1e-3), "must have weight_decay=0 or False, got 0.001"),
        (lambda p: sgd([{"params": list(p)[:1]}, {"params": list(p)[1:]}]), "must have one group of parameters"),
    ],
)
def test_other_optimizers_are_refused(optimizer, says):
    with pytest.raises(ValueError, match=says):
        make(Net(), optimizer=optimizer)


def test_a_hypergradient_that_is_not_finite_moves_nothing():
    train, (held_out, wanted) = batches()
    method = make(Net(), skip_nonfinite=1)
    method.train_step(train, 0)
    before = method.location.detach().clone()
    with pytest.warns(RuntimeWarning, match="the validation loss is inf at step 1"):
        method.valid_step((held_out, wanted * 1e30), 1)
    assert method._validation_gradients == []
    method.valid_step((held_out * 1e7, wanted * 1e13), 2)
    method._validation_gradients = [[part * 1e30 for part in method._validation_gradients[0]]]
    with pytest.warns(RuntimeWarning, match="gradient of hyperparameter 'optimizer.learning_rate'"):
        method.train_step(train, 3)
    assert torch.equal(method.location, before)


@pytest.mark.parametrize("hyper_optimizer", [partial(torch.optim.Adam, lr=0.1), partial(torch.optim.RMSprop, lr=0.1)])
def test_a_device_that_would_decide_does_not(hyper_optimizer, monkeypatch):
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    (inputs, targets), valid = batches()
    bad = inputs, targets * torch.inf
    method = make(Net(), hyper_optimizer=hyper_optimizer, optimizer=partial(sgd, fused=True), skip_nonfinite=1)
    method.train_step((inputs, targets), 0)
    before = copy.deepcopy(method.model.state_dict())
    with pytest.warns(RuntimeWarning, match="the training loss is"):
        method.train_step(bad, 1)
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    method.train_step((inputs, targets), 2)
    assert not torch.equal(method.model.last.weight, before["last.weight"])
    method.valid_step(valid, 3)
    method._validation_gradients[0][-1].fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="gradient of hyperparameter"):
        method.train_step((inputs, targets), 4)
    method.valid_step(valid, 5)
    method.train_step((inputs, targets), 6)
    assert method.location.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in method.model.parameters())


def test_hypergradients_that_are_never_finite_are_an_error_that_changes_nothing():
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, inputs, hyper):
            return super().forward(self.norm(inputs), hyper)

    train, valid = batches()
    method = make(Normed(), skip_nonfinite=1)
    method.train_step(train, 0)
    for step in (1, 3):
        method.valid_step(valid, step)
        method._validation_gradients[0][-1].fill_(torch.nan)
        before = method.model.norm.num_batches_tracked.item()
        if step == 1:
            with pytest.warns(RuntimeWarning, match="gradient of hyperparameter"):
                method.train_step(train, step + 1)
        else:
            with pytest.raises(NonFiniteError, match="nor was the one before it"):
                method.train_step(train, step + 1)
    assert method.model.norm.num_batches_tracked.item() == before


def test_several_validation_steps_are_averaged():
    train, (held_out, wanted) = batches()
    torch.manual_seed(0)
    model = Net()
    found = []
    for halves in ([slice(0, 40)], [slice(0, 20), slice(20, 40)]):
        method = make(copy.deepcopy(model))
        for step, half in enumerate(halves):
            method.valid_step((held_out[half], wanted[half]), step)
        method.train_step(train, 2)
        found.append(method.location.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-8)


def test_what_is_0_is_not_tuned():
    method = make(Net(), optimizer=partial(torch.optim.SGD, lr=0.1), weight_decay=0)
    train, valid = batches()
    hypergradient(method, train, valid)
    assert method.space.names == ("dropout", RATE)
    assert method.optimizer.param_groups[0]["momentum"] == 0
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        make(Net(), weight_decay=-1)


def test_a_state_fits_another_first_guess_but_not_another_optimizer():
    state = make(Net()).state_dict()
    other = make(Net(), optimizer=partial(sgd, lr=0.4))
    other.load_state_dict(state)
    assert other.learning_rate == pytest.approx(0.1)
    with pytest.raises(ValueError, match="optimizers"):
        make(Net(), hyper_optimizer=partial(torch.optim.RMSprop, lr=0.1)).load_state_dict(state)
