"""The state of SelfTuner: a resumed run is the same bit for bit, other states are refused; the history and its plot."""

import copy
import io
import sys

import pytest
import torch
import torch.nn.functional as F
from random_response import respond
from torch import nn

import stn_fast as stn
from stn_fast.errors import UserError

RATE = stn.Hyperparameter("dropout", low=0.0, high=0.9, init=0.3)
DECAY = stn.Hyperparameter("weight_decay", low=0.0, init=1e-2)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(13, 6, generator=generator), torch.randint(4, (13,), generator=generator)


def tuner_of(method="stn", space=(RATE, DECAY), make=torch.optim.Adam, rank="auto", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Dropout(0.3), nn.Linear(11, 4))
    tuned = respond(stn.convert(model, stn.HyperparameterSpace(space), response_rank=rank, quiet=True))
    return stn.SelfTuner(tuned, make(tuned.parameters(), lr=0.05), F.cross_entropy, method=method, **options)


def by_steps(tuner, k):
    tuner.step(batch(k), batch(100 + k) if k % 2 else None)


def by_passes(tuner, k):
    """Two passes for each step of the optimizer, with clipping."""
    delta, optimizer = tuner.method.name == "delta-stn", tuner.method.optimizer
    for part in range(2):
        x, y = batch(2 * k + part)
        with tuner.training(13):
            (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
        with tuner.responding(13) if delta else tuner.training(13, antithetic=True) as linearised:
            (F.cross_entropy((linearised or tuner.model)(x), y) + tuner.penalty()).backward()
    nn.utils.clip_grad_norm_(tuner.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    x, y = batch(100 + k)
    with tuner.validating(13):
        loss = F.cross_entropy(tuner.model(x), y)
    tuner.hyper_step(loss)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    for mine, theirs in zip(one.method.optimizers, other.method.optimizers, strict=True):
        for of_mine, of_theirs in zip(mine.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(number, of_theirs[key]) for key, number in of_mine.items())
    assert one.history == other.history
    assert (one.draws, one.trained, one.validated) == (other.draws, other.trained, other.validated)


@pytest.mark.parametrize("run", [by_steps, by_passes])
@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_a_resumed_run_is_the_same_bit_for_bit(method, run):
    whole, first, second = (tuner_of(method) for _ in range(3))
    for k in range(5):
        run(whole, k)
    for k in range(2):
        run(first, k)
    second.load_state_dict(saved(first.state_dict()))
    assert_same(first, second)
    assert bool(second.model.tuned_hyperparameters.centred) == (method == "delta-stn")
    for k in range(2, 5):
        run(second, k)
    assert_same(whole, second)
    assert len(second.history) == (2 if run is by_steps else 5)


class Draws(nn.Module):
    """Has dropout that is not converted."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, self.training)


@pytest.mark.parametrize("run", [by_steps, by_passes])
def test_a_resumed_run_has_the_draws_of_torchs_generator(run):
    def made():
        torch.manual_seed(0)
        tuned = stn.convert(Draws(), quiet=True)
        return stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.05), F.cross_entropy, check_rows=False)

    whole = made()
    for k in range(5):
        if k == 2:
            state = saved(whole.state_dict())
        run(whole, k)
    resumed = made()
    torch.manual_seed(123)
    resumed.load_state_dict(state)
    for k in range(2, 5):
        run(resumed, k)
    assert_same(whole, resumed)


def test_a_loaded_state_leaves_no_draw_to_repeat_and_no_pass_to_count():
    tuner, state = tuner_of(), tuner_of().state_dict()
    x, y = batch(0)
    with tuner.training(13):
        (F.cross_entropy(tuner.model(x), y) + tuner.penalty()).backward()
    tuner.load_state_dict(state)
    with pytest.raises(RuntimeError, match="repeats the draw of the pass before"):
        tuner.training(13, antithetic=True).__enter__()
    tuner.method.optimizer.step()
    assert (tuner.trained, tuner.draws) == (0, 0)


def test_hyperparameters_in_another_order_are_matched_by_name():
    """With one optimizer of both steps, whose state is reordered once."""
    first, second = tuner_of("delta-stn", rank=None), tuner_of("delta-stn", (DECAY, RATE), rank=None)
    for k in range(4):
        by_steps(first, k)
    second.load_state_dict(saved(first.state_dict()))
    assert second.values() == first.values()
    assert second.history == first.history
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            one, other = first.method.optimizer.state[mine][key], second.method.optimizer.state[theirs][key]
            assert torch.equal(one, other.flip(-1) if one.shape[-1] == 2 else other)


def states():
    other = stn.Hyperparameter("dropout", low=0.0, high=0.5, init=0.3)
    return {
        "another method": (lambda: tuner_of("delta-stn").state_dict(), "saved with the method delta-stn, but.*has stn"),
        "another optimizer": (
            lambda: tuner_of(make=torch.optim.SGD).state_dict(),
            "saved with the optimizers SGD, Adam",
        ),
        "other bounds": (lambda: tuner_of(space=(other, DECAY)).state_dict(), "dropout high=0.5 there, 0.9 here"),
        "fewer": (lambda: tuner_of(space=(RATE,)).state_dict(), "not those of this method: weight_decay only here"),
        "that of the model": (
            lambda: tuner_of().model.state_dict(),
            r"SelfTuner\.state_dict\(\) has returned, got a dict",
        ),
        "that of the method": (lambda: tuner_of().method.state_dict(), r"SelfTuner\.state_dict\(\) has returned"),
        "with a bad history": (
            lambda: {**tuner_of().state_dict(), "history": [{"step": 1}]},
            r"the history of the state is not one .*KeyError\('loss'\)",
        ),
        "with no history": (lambda: {**tuner_of().state_dict(), "history": None}, "history of the state is not one"),
        "with a bad history of another space": (
            lambda: {**tuner_of(space=(RATE,)).state_dict(), "history": [{}]},
            "weight_decay only here",
        ),
        "nothing": (lambda: {}, "got a dict of nothing"),
        "None": (lambda: None, "got NoneType"),
        "that of no method": (lambda: {**tuner_of().state_dict(), "method": {}}, "a method's state_dict"),
    }


@pytest.mark.parametrize("kind", states())
def test_other_states_are_refused_and_change_nothing(kind):
    make, message = states()[kind]
    tuner, same = tuner_of(), tuner_of()
    for one in (tuner, same):
        by_passes(one, 0)
    with pytest.raises(ValueError, match=message):
        tuner.load_state_dict(make())
    assert_same(tuner, same)


def test_a_state_is_not_loaded_inside_of_a_pass():
    tuner = tuner_of()
    state = copy.deepcopy(tuner.state_dict())
    with tuner.validating(13), pytest.raises(RuntimeError, match=r"load_state_dict: the pass .* is still open"):
        tuner.load_state_dict(state)


# The plot


def test_the_history_is_plotted_over_training_steps(tmp_path):
    tuner = tuner_of()
    for k in range(6):
        by_steps(tuner, k)
    file = tmp_path / "history.png"
    figure = tuner.plot(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    losses, *panels = figure.axes[:3]
    history = tuner.history
    assert [axis.get_title("left") for axis in figure.axes[:3]] == ["validation loss", "dropout", "weight decay"]
    assert {axis.get_xlabel() for axis in figure.axes[:3]} == {"training step"}
    assert losses.get_lines()[0].get_xydata().tolist() == [[row["step"], row["loss"]] for row in history]
    for panel, one in zip(panels, (RATE, DECAY), strict=True):
        line, guess = panel.get_lines()
        assert line.get_xydata().tolist() == [[row["step"], row["values"][one.name]] for row in history]
        assert set(guess.get_ydata()) == {one.init}
    assert (panels[0].get_yscale(), panels[1].get_yscale()) == ("linear", "log")
    assert tuner.plot() is not figure


def test_what_can_t_be_plotted_is_one_clear_error(monkeypatch, tmp_path):
    tuner = tuner_of()
    with pytest.raises(ValueError, match="no history before the first validation step"):
        tuner.plot()
    tuner.valid_step(batch(0))
    with pytest.raises(UserError, match=r"path .*nowhere/history\.png cannot be written"):
        tuner.plot(tmp_path / "nowhere" / "history.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is missing: pip install 'stn-fast\[train\]'"):
        tuner.plot()
