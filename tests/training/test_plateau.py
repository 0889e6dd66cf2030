"""The learning rate falls and a run ends where the validation losses say so, and resuming changes neither."""

import copy
import json

import numpy as np
import pytest
from run_files import result, rows

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training.build import build_method
from stn_fast.training.config import OptimizerConfig
from stn_fast.training.metrics import MetricsLog
from stn_fast.training.plateau import Plateau, Stop
from stn_fast.training.trainer import Trainer


def plateau_of(patience=None, **optimizer):
    return Plateau(OptimizerConfig(learning_rate=0.1, **optimizer), patience)


def fed(losses, patience=None, **optimizer):
    plateau = plateau_of(patience, **optimizer)
    for loss in losses:
        plateau.add(loss)
    return plateau


@pytest.mark.parametrize("decay_patience", [1, 2, 5])
def test_the_rate_decays_if_a_loss_is_no_better_than_decay_patience_epochs_ago(decay_patience):
    losses = np.random.default_rng(0).normal(size=40) - np.linspace(0, 3, 40)
    expected = [
        now for now in range(40) if any(losses[now] >= losses[earlier] for earlier in range(now - decay_patience + 1))
    ]
    assert 0 < len(expected) < 40 - decay_patience
    plateau = plateau_of(decay_factor=0.5, decay_patience=decay_patience)
    rates = [plateau.add(loss) for loss in losses]
    assert plateau.decays == [epoch for epoch, rate in enumerate(rates) if rate is not None] == expected
    assert [rate for rate in rates if rate is not None] == [0.1 * 0.5 ** (k + 1) for k in range(len(expected))]


def test_an_equal_loss_is_no_better():
    assert fed([1.0, 1.0], decay_factor=0.5, decay_patience=1).decays == [1]


def test_a_factor_of_1_never_decays():
    plateau = plateau_of(decay_patience=1)
    assert [plateau.add(loss) for loss in (1.0, 2.0, 3.0)] == [None] * 3


def test_patience_counts_epochs_since_the_best():
    losses = [3.0, 2.0, 2.5, 1.0, 1.0, 1.2]
    assert fed(losses, patience=3).stop is None
    assert fed([*losses, 1.1, 0.5], patience=3).stop == Stop(6, "schedule.patience")


def test_a_learning_rate_below_the_minimum_stops():
    losses = [1.0, 2.0, 2.0, 2.0]
    options = dict(decay_factor=0.5, decay_patience=1)
    assert fed(losses, min_learning_rate=0.05, **options).stop == Stop(2, "optimizer.min_learning_rate")
    assert fed(losses, min_learning_rate=0.0, **options).stop is None
    assert fed(losses, patience=1, min_learning_rate=0.02, **options).stop == Stop(1, "schedule.patience")


def test_a_plateau_restored_from_its_state_decides_the_same():
    options = dict(patience=4, decay_factor=0.5, decay_patience=2, min_learning_rate=0.02)
    losses = [1.0, 0.5, 0.7, 0.6, 0.8, 0.4]
    whole, first = fed([*losses, *losses], **options), fed(losses, **options)
    resumed = fed([], **options)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in losses:
        resumed.add(loss)
    assert (resumed.decays, resumed.stop) == (whole.decays, whole.stop)
    assert resumed.add(9.0) == whole.add(9.0) == 0.1 * 0.5 ** len(whole.decays)


DECAYING = (
    "optimizer.clip=null",
    "optimizer.learning_rate=0.3",
    "optimizer.decay_factor=0.5",
    "optimizer.decay_patience=1",
)


def rates(directory):
    return {row["epoch"]: row["learning_rate"] for row in rows(directory) if row["phase"] == "train"}


def kill_at(patch, step):
    advance = Trainer._advance

    def advance_or_die(trainer):
        if trainer.step == step:
            raise KeyboardInterrupt
        advance(trainer)

    patch.setattr(Trainer, "_advance", advance_or_die)


def test_a_run_trains_at_the_rate_that_its_losses_ask_for(train):
    directory = train("schedule.epochs=10", *DECAYING)
    losses = [row["loss"] for row in rows(directory) if row["phase"] == "eval"]
    found, rate = rates(directory), 0.3
    for epoch in range(1, 11):
        assert found[epoch] == pytest.approx(rate)
        rate *= 0.5 if losses[epoch] >= min(losses[:epoch]) else 1.0
    assert found[10] < 0.3
    first = min(epoch for epoch in found if found[epoch] < 0.3)
    held = rows(train("schedule.epochs=10", *DECAYING[:2], name="held"))
    assert [row for row in held if row["phase"] == "eval"][first]["loss"] != losses[first]


def test_a_run_reports_the_rate_of_its_method_also_one_that_was_set_or_restored(make_config, tmp_path):
    def fitted(name, change):
        config = make_config("schedule.epochs=1")
        task = digits.build(config)
        trainer = Trainer(config, task, build_method(config, task), tmp_path / name)
        change(trainer)
        with MetricsLog(tmp_path / f"{name}.jsonl", 0) as log:
            trainer.fit(log)
        assert trainer.method.optimizer.param_groups[0]["lr"] == trainer.method.learning_rate
        written = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        return trainer, [row["learning_rate"] for row in written if row["phase"] == "train"]

    def lower(trainer):
        trainer.method.learning_rate = 0.0123

    lowered, rates = fitted("lowered", lower)
    assert rates == [0.0123]
    state = copy.deepcopy(lowered.method.state_dict())
    assert fitted("restored", lambda trainer: trainer.method.load_state_dict(state))[1] == [0.0123]
    assert fitted("as configured", lambda trainer: None)[1] == [0.05]


@pytest.mark.parametrize("step", [60, 85])
def test_a_run_killed_around_a_decay_and_resumed_equals_one_never_killed(train, same_run, step):
    whole = train("schedule.epochs=10", *DECAYING, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train("schedule.epochs=10", *DECAYING, name="killed")
    same_run(whole, train("schedule.epochs=10", *DECAYING, name="killed"))


def test_the_early_report_of_an_unfinished_epoch_does_not_count(train, same_run):
    whole = train("schedule.epochs=10", *DECAYING, name="whole")
    train("schedule.epochs=10", "schedule.max_steps=85", *DECAYING, name="short")
    same_run(whole, train("schedule.epochs=10", *DECAYING, name="short"))


def test_a_run_without_a_better_loss_stops_and_says_why(train):
    # Once an epoch was no better, nothing moves, so no later one can be better.
    still = "optimizer.decay_factor=1e-30", "method.freeze=true"
    directory = train("schedule.epochs=40", "schedule.patience=2", *DECAYING, *still)
    got, losses = result(directory), [row["loss"] for row in rows(directory) if row["phase"] == "eval"]
    assert got["ended_by"] == "schedule.patience"
    assert got["epochs"] < 40
    assert got["epochs"] == len(losses) - 1 == losses.index(min(losses)) + 2


def test_a_run_whose_rate_is_too_low_stops_and_says_why(train):
    directory = train("schedule.epochs=40", "optimizer.min_learning_rate=0.1", *DECAYING)
    got = result(directory)
    assert got["ended_by"] == "optimizer.min_learning_rate"
    assert got["epochs"] < 40
    assert rates(directory)[got["epochs"]] == pytest.approx(0.15)


@pytest.mark.parametrize("less", ["schedule.patience=1", "optimizer.min_learning_rate=0.2"])
def test_a_run_that_stopped_early_goes_on_when_it_is_asked_to(train, same_run, less):
    whole = train("schedule.epochs=12", *DECAYING, name="whole")
    short = train("schedule.epochs=12", less, *DECAYING, name="short")
    assert result(short)["epochs"] < 12
    assert result(whole)["ended_by"] == "schedule.epochs"
    same_run(whole, train("schedule.epochs=12", *DECAYING, name="short"))


@pytest.mark.parametrize("less", ["schedule.patience=1", "optimizer.min_learning_rate=0.2"])
def test_a_run_that_would_have_stopped_before_is_refused(train, less):
    train("schedule.epochs=12", *DECAYING)
    key, _, value = less.partition("=")
    with pytest.raises(
        UserError, match=rf"epoch 12, but {key} = {value} ends it earlier: change this with --set {key}"
    ):
        train("schedule.epochs=12", less, *DECAYING)


def test_a_finished_run_does_not_restart_for_another_decay(train):
    train(*DECAYING)
    with pytest.raises(UserError, match=r"optimizer.decay_factor: 0.5 -> 0.1"):
        train(*DECAYING, "optimizer.decay_factor=0.1")
