"""A state is loaded into the hyperparameters that it was saved of: told by name, and compared."""

import copy
import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from gates_alone import FixedHyperparameters, SelfTuning

import stn_fast as stn
from stn_fast.training.hyper_state import reorder
from stn_fast.training.task import classification_loss, decayed_classification_loss

RATE = stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.3)
DECAY = stn.Hyperparameter("weight_decay", low=0.0, init=1e-2)
NOISE = stn.Hyperparameter("noise", low=0.0, init=0.2, scale=0.3)
SPACE = [RATE, DECAY, NOISE]
BATCH = torch.randn(32, 6), torch.randint(4, (32,))


class Network(torch.nn.Module):
    """Its numbers don't depend on the order of the hyperparameters, once its gates are in that order."""

    def __init__(self):
        super().__init__()
        self.first = stn.HyperLinear(6, 16, num_hyperparameters=3)
        self.lstm = stn.HyperLSTM(16, 8, num_hyperparameters=3)
        self.drop = stn.PerExampleDropout("rate", stream=1)
        self.last = stn.HyperLinear(8, 4, num_hyperparameters=3)

    def forward(self, x, hyper):
        x = self.drop(self.first(x, hyper).relu(), hyper)
        return self.last(self.lstm(x[None], hyper)[0][0], hyper)


def method_of(hyperparameters, kind=SelfTuning, **options):
    torch.manual_seed(0)
    objectives = [decayed_classification_loss, classification_loss][: 2 if kind is SelfTuning else 1]
    return kind(Network(), stn.HyperparameterSpace(hyperparameters), *objectives, **options)


def trained(hyperparameters=SPACE, kind=SelfTuning, **options):
    method = method_of(hyperparameters, kind, **options)
    for step in range(4):
        method.train_step(BATCH, 2 * step)
        if method.tunes:
            method.valid_step(BATCH, 2 * step + 1)
    return method


def saved(method):
    """Through a file, as a checkpoint is."""
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": torch.optim.Adam, "hyper_optimizer": torch.optim.RMSprop}, {"tune_scales": False}],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_state_with_another_order_is_matched_by_name(order, options):
    one, other = trained(**options), method_of([SPACE[k] for k in order], **options)
    other.load_state_dict(saved(one))
    want, got = (method.space.values(method.location) for method in (one, other))
    assert got == want
    assert dict(zip(other.space.names, other.scales().tolist(), strict=True)) == dict(
        zip(one.space.names, one.scales().tolist(), strict=True)
    )
    # Without perturbation, whose draws go by column, the two are the same method from here on.
    for method in (one, other):
        method._perturbed = lambda draw, antithetic=False, method=method: method.unperturbed(draw["batch_size"])
        if method.tunes:
            method.tune_scales = False
            method.validation_objective = classification_loss
    for step in range(20, 24):
        torch.testing.assert_close(one.train_step(BATCH, step), other.train_step(BATCH, step))
    for name, value in one.model.named_parameters():
        theirs = dict(other.model.named_parameters())[name]
        torch.testing.assert_close(theirs, value[:, order] if "gate" in name else value, rtol=1e-4, atol=1e-6)


def test_optimizer_moments_are_reordered_with_their_hyperparameters():
    one, other = trained(), method_of(SPACE[::-1])
    other.load_state_dict(saved(one))
    for mine, theirs in ((one.location, other.location), (one.raw_scale, other.raw_scale)):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(one.hyper_optimizer.state[mine][key].flip(0), other.hyper_optimizer.state[theirs][key])
    gate, flipped = one.model.first.weight_gate, other.model.first.weight_gate
    momentum = one.optimizer.state[gate]["momentum_buffer"], other.optimizer.state[flipped]["momentum_buffer"]
    assert torch.equal(momentum[0].flip(1), momentum[1])


@pytest.mark.parametrize("kind", [SelfTuning, FixedHyperparameters])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(high=0.5), "rate high=0.9 there, 0.5 here"),
        (dict(low=0.1), "rate low=0.0 there, 0.1 here"),
        (dict(high=None), "rate high=0.9 there, None here"),
        (dict(low=None, high=None), "rate low=0.0 there, None here; rate high=0.9 there, None here"),
        (dict(integer=True), "rate integer=False there, True here"),
        (dict(per_example=False), "rate per_example=True there, False here"),
        (dict(init=0.05), "rate init=0.3 there, 0.05 here"),
    ],
)
def test_differences_are_named_and_nothing_is_loaded(kind, change, message):
    state = saved(trained(kind=kind))
    other = method_of([replace(RATE, **change), DECAY, NOISE], kind)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"the state's hyperparameters differ from this method's: {message}"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert torch.equal(after["location"], before["location"])
    assert all(torch.equal(value, before["model"][name]) for name, value in after["model"].items())


def test_different_hyperparameter_names_are_listed_in_the_error():
    state = saved(trained())
    with pytest.raises(ValueError, match="are not those of this method: noise only there; jitter only here"):
        method_of([RATE, DECAY, replace(NOISE, name="jitter")]).load_state_dict(state)


def test_a_different_response_is_named_in_the_error():
    state, raw = saved(trained()), [replace(one, response="raw") for one in SPACE]
    with pytest.raises(ValueError, match="rate response='shifted' there, 'raw' here"):
        method_of(raw).load_state_dict(state)


def test_a_different_first_guess_is_accepted_unless_the_response_depends_on_it():
    raw = [replace(one, response="raw") for one in SPACE]
    other = method_of([replace(raw[0], init=0.05), *raw[1:]])
    one = trained(raw)
    other.load_state_dict(saved(one))
    assert torch.equal(other.location, one.location)


def test_a_different_initial_scale_is_accepted():
    one, other = trained(), method_of([replace(RATE, scale=1.0), DECAY, NOISE])
    other.load_state_dict(saved(one))
    assert torch.equal(other.raw_scale, one.raw_scale)


def test_a_state_that_says_nothing_of_its_hyperparameters_is_refused():
    state = saved(trained())
    del state["hyperparameters"]
    with pytest.raises(ValueError, match="must be one that a method's"):
        method_of(SPACE).load_state_dict(state)


def test_factored_moments_follow_their_hyperparameters():
    """Adafactor keeps a row for the columns of a gate: (1, n)."""
    location = torch.zeros(3, 2, requires_grad=True)
    optimizer = torch.optim.Adafactor([location])
    location.grad = torch.tensor([[1.0, 2.0]] * 3)
    optimizer.step()
    before = optimizer.state[location]["col_var"].clone()
    reorder([1, 0], [location], [optimizer])
    assert torch.equal(optimizer.state[location]["col_var"], before[:, [1, 0]])
    assert not torch.equal(before, before[:, [1, 0]])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(optimizer=partial(torch.optim.Adam, lr=1e-3)), r"optimizers Adam, Adam, but this method has SGD, Adam"),
        (dict(hyper_optimizer=partial(torch.optim.SGD, lr=0.1)), r"optimizers SGD, SGD, but this method has SGD, Adam"),
        (dict(kind=FixedHyperparameters), r"method FixedHyperparameters, but this method has SelfTuning"),
    ],
)
def test_a_state_of_another_method_or_other_optimizers_is_refused_and_nothing_loaded(other, says):
    state, method = saved(trained(**other)), trained()
    before = saved(method)
    with pytest.raises(ValueError, match=says):
        method.load_state_dict(state)
    assert str(saved(method)) == str(before)


@pytest.mark.parametrize("state", [None, {}, torch.nn.Linear(2, 2).state_dict()], ids=["None", "empty", "of a module"])
def test_anything_but_a_state_of_a_method_is_refused(state):
    with pytest.raises(ValueError, match=r"must be one that a method's state_dict\(\) has returned, got "):
        method_of(SPACE).load_state_dict(state)


def test_a_state_that_does_not_fit_leaves_everything_as_it_was():
    method, state = trained(), saved(trained())
    state["optimizer"]["param_groups"][0]["params"].pop()
    state["model"]["first.weight"] += 1
    before = saved(method)
    with pytest.raises(ValueError, match="parameter group"):
        method.load_state_dict(state)
    assert str(saved(method)) == str(before)
    method.train_step(BATCH, 99)
