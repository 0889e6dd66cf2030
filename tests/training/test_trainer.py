"""Runs of the trainer: determinism, resuming, the best checkpoint, divergence, and that self-tuning pays."""

import json
import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from own_batches import SummingExamples
from run_files import result, rows

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.averaging import averaged_model
from stn_fast.training.build import build_method
from stn_fast.training.methods import Method, SelfTuning
from stn_fast.training.progress import Progress
from stn_fast.training.run import run, using_threads
from stn_fast.training.saving import Saving
from stn_fast.training.task import classification_loss
from stn_fast.training.trainer import Diverged, Trainer


class Killed(BaseException):
    """Ends a run between two steps as abruptly as a signal that cannot be caught."""


def kill_at(monkeypatch, step):
    advance = Trainer._advance

    def advance_or_die(trainer):
        if trainer.step == step:
            raise Killed
        advance(trainer)

    monkeypatch.setattr(Trainer, "_advance", advance_or_die)


def damage(directory, step):
    (checkpoint.path_of(directory / "checkpoints", step) / checkpoint.STATE).write_bytes(b"not a checkpoint")


def test_two_runs_of_one_seed_give_the_same_rows(train, same_run):
    same_run(train(name="one"), train(name="other"))


def test_another_seed_gives_other_rows(train):
    assert rows(train(name="one")) != rows(train("seed=1", name="other"))


def test_rows_carry_what_they_should(train):
    found = rows(train(), timeless=False)
    always = {"step", "epoch", "phase", "wall_seconds", "cpu_seconds", "loss", "examples_per_second"}
    assert all(always <= row.keys() for row in found)
    tuned = {"hyperparameters", "scales", "hyperparameters_low", "hyperparameters_high"}
    assert all(tuned <= row.keys() for row in found if row["phase"] in ("valid", "eval"))
    phases = [(row["epoch"], row["phase"]) for row in found]
    warmup = [(epoch, phase) for epoch in (1, 2) for phase in ("train", "eval")]
    tuning = [(epoch, phase) for epoch in (3, 4, 5, 6) for phase in ("train", "valid", "eval")]
    assert phases == [(0, "eval"), *warmup, *tuning]
    # 900 examples in batches of 100, one validation step after every two training steps past 18 of warm-up.
    assert found[-1]["step"] == 54 + (54 - 18) // 2


@pytest.mark.parametrize("step", [5, 9, 25, 40, 71])
def test_a_run_killed_anywhere_and_resumed_equals_one_never_killed(train, same_run, whole, tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(name="killed")
    killed = tmp_path / "killed"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')
    train(name="killed")
    same_run(whole, killed)


@pytest.mark.parametrize("first", ["schedule.max_steps=31", "schedule.max_steps=45", "schedule.epochs=3"])
def test_a_finished_run_that_is_asked_for_more_equals_one_that_never_stopped(train, same_run, whole, first):
    short = train(first, name="short")
    assert result(short)["steps"] < result(whole)["steps"]
    same_run(whole, train(name="short"))


@pytest.mark.parametrize("settings", [(), ("method.response_learning_rate=0.02", "method.linearize=false")])
def test_a_run_of_delta_stn_that_goes_on_equals_one_that_never_stopped(train, same_run, settings):
    given = ("method.name=delta-stn", "schedule.epochs=3", "optimizer.decay_factor=0.5", *settings)
    whole = train(*given, name="whole")
    assert result(whole)["method"] == "delta-stn"
    trained = [row for row in rows(whole) if row["phase"] == "train"]
    assert len(trained) == 3
    assert all(0 < row["response_loss"] != row["loss"] for row in trained)
    train(*given, "schedule.max_steps=23", name="stopped")
    same_run(whole, train(*given, name="stopped"))


@pytest.mark.parametrize("stop", [22, 23, 24, 25])
def test_a_run_of_one_pass_that_goes_on_equals_one_that_never_stopped(train, same_run, stop):
    given = ("method.name=one-pass", "schedule.epochs=3")
    whole = train(*given, name="whole")
    assert result(whole)["method"] == "one-pass"
    assert result(whole)["hyperparameters_end"]["optimizer.momentum"] != pytest.approx(0.9, abs=1e-4)
    train(*given, f"schedule.max_steps={stop}", name="stopped")
    same_run(whole, train(*given, name="stopped"))


@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_scales_that_decay_end_at_their_share_and_a_run_that_goes_on_equals_one_that_never_stopped(
    train, same_run, method
):
    given = (f"method.name={method}", "method.tune_scales=false", "method.scale_decay=0.25")
    whole = train(*given, name="whole")
    scales = [row["scales"]["input_dropout"] for row in rows(whole) if row["phase"] == "eval"]
    assert scales == pytest.approx([0.5 * 0.25 ** (max(0, epoch - 1) / 6) for epoch in range(7)], rel=1e-5)
    train(*given, "schedule.max_steps=31", name="stopped")
    same_run(whole, train(*given, name="stopped"))


def test_evaluations_use_the_average_of_the_weights_over_training_steps(make_config):
    """And training does not depend on it; the average is as written out here."""
    config = make_config("optimizer.average=0.9", "schedule.epochs=3")
    task, plain = digits.build(config), make_config("schedule.epochs=3")
    trainer, other = (
        Trainer(each, task, build_method(each, digits.build(each)), Path(each.directory)) for each in (config, plain)
    )
    weights = {name: weight.detach().clone() for name, weight in trainer.method.model.named_parameters()}
    for step in range(20):
        trainer._take_step()
        other._take_step()
        share = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for name, weight in trainer.method.model.named_parameters():
            weights[name] = share * weights[name] + (1 - share) * weight.detach()
    for name, weight in trainer.averaged.module.named_parameters():
        torch.testing.assert_close(weight, weights[name])
    for one, same in zip(trainer.method.model.parameters(), other.method.model.parameters(), strict=True):
        assert torch.equal(one, same)
    evaluated = trainer.evaluate(task.data.valid)
    assert evaluated != other.evaluate(task.data.valid)
    other.method.model.load_state_dict(weights, strict=False)
    assert other.evaluate(task.data.valid) == pytest.approx(evaluated, rel=1e-5)


def test_a_run_with_averaged_weights_that_goes_on_equals_one_that_never_stopped(train, same_run):
    whole = train("optimizer.average=0.9", name="whole")
    assert rows(whole) != rows(train(name="not averaged"))
    train("optimizer.average=0.9", "schedule.max_steps=31", name="stopped")
    same_run(whole, train("optimizer.average=0.9", name="stopped"))
    best = min((row for row in rows(whole) if row["phase"] == "eval"), key=lambda row: row["loss"])
    assert result(whole)["valid_loss"] == best["loss"]


def test_averaged_weights_refuse_running_statistics():
    with pytest.raises(UserError, match=r"optimizer\.average = 0\.9: must be 0 .* as 0\.running_mean"):
        averaged_model(torch.nn.Sequential(torch.nn.BatchNorm1d(2)), 0.9)


def test_a_run_whose_scales_decay_refuses_another_number_of_epochs(train):
    given = ("method.tune_scales=false", "method.scale_decay=0.25")
    train(*given, "schedule.max_steps=31")
    with pytest.raises(UserError, match=r"schedule.epochs: 6 -> 9"):
        train(*given, "schedule.epochs=9")


def test_a_finished_run_asked_again_gives_its_result_without_training(train, make_config, monkeypatch):
    directory = train()
    before = json.loads((directory / "result.json").read_text())
    kill_at(monkeypatch, 0)
    assert run(make_config(), digits.build) == before


def test_a_run_that_went_further_than_asked_is_refused(train):
    train()
    says = "already at step 72, epoch 6, but schedule.epochs = 3 ends it earlier: change this with --epochs"
    with pytest.raises(UserError, match=says):
        train("schedule.epochs=3")
    with pytest.raises(UserError, match=r"but schedule.max_steps = 3 ends it earlier.*--max-steps"):
        train("schedule.max_steps=3")


def test_the_error_for_resuming_with_other_settings_names_them_and_what_to_do(train):
    train("schedule.max_steps=3")
    says = r"optimizer.learning_rate: 0.05 -> 0.1; seed: 0 -> 4.*another --run-dir.*--no-resume"
    with pytest.raises(UserError, match=says):
        train("optimizer.learning_rate=0.1", "seed=4")


def test_starting_over_forgets_the_run_that_was_there(train, same_run):
    fresh = train(name="fresh")
    train("seed=7", name="again")
    same_run(fresh, train(name="again", resume=False))


def test_a_mistaken_restart_loses_nothing(train):
    directory = train()
    before = rows(directory)
    with pytest.raises(UserError, match="batch_size"):
        train("schedule.batch_size=1000", resume=False)
    assert rows(directory) == before
    assert checkpoint.steps(directory / "checkpoints")


def test_the_best_checkpoint_holds_weights_and_hyperparameters_of_the_best_row(train, make_config):
    directory = train("schedule.epochs=12", "optimizer.learning_rate=0.2")
    found = [row for row in rows(directory) if row["phase"] == "eval"]
    best = min(found, key=lambda row: row["loss"])
    got = result(directory)
    assert (got["best_step"], got["valid_loss"]) == (best["step"], best["loss"])
    assert got["test_loss"] == best["test_loss"]
    assert got["hyperparameters"] == best["hyperparameters"]
    config = make_config("schedule.epochs=12", "optimizer.learning_rate=0.2")
    task = digits.build(config)
    trainer = Trainer(config, task, build_method(config, task), directory / "checkpoints")
    trainer.best = {"step": got["best_step"], "valid_loss": got["valid_loss"]}
    trainer.restore_best()
    with using_threads(config.threads):
        assert trainer.evaluate(task.data.valid)["loss"] == best["loss"]
    assert task.space.values(trainer.method.location.detach()) == best["hyperparameters"]


def test_a_damaged_last_checkpoint_falls_back_and_says_so(train, same_run, whole, capfd):
    directory = train("schedule.max_steps=50", name="hurt")
    last = checkpoint.steps(directory / "checkpoints")[-1]
    damage(directory, last)
    train(name="hurt")
    assert f"step-{last:08d}" in (said := capfd.readouterr().err)
    assert "falling back" in said
    same_run(whole, directory)


@pytest.mark.parametrize("when", ["resuming", "at the end"])
def test_a_damaged_best_checkpoint_costs_no_more_than_itself(train, capfd, monkeypatch, when):
    pairs = ("optimizer.learning_rate=0.2", "optimizer.clip=null", "schedule.checkpoint_epochs=1")
    directory = train("schedule.epochs=10", *pairs)
    best, found = result(directory)["best_step"], checkpoint.steps(directory / "checkpoints")
    assert found[-1] != best
    capfd.readouterr()
    damage(directory, best)
    (directory / "result.json").unlink()
    if when == "at the end":
        check, calls = Trainer.check_best, []
        monkeypatch.setattr(
            Trainer, "check_best", lambda trainer, warn: calls.append(1) or (len(calls) > 1 and check(trainer, warn))
        )
    train("schedule.epochs=10", *pairs)
    got = result(directory)
    assert got["best_step"] in set(found) - {best}
    said = capfd.readouterr().err
    assert said.startswith("warning: the best checkpoint")
    assert said.count("warning") == 1
    assert f"step-{best:08d}" in said
    assert f"step-{got['best_step']:08d} (validation loss" in said.partition("; the best of the others is ")[2]
    losses = {row["step"]: row["loss"] for row in rows(directory) if row["phase"] == "eval"}
    assert got["valid_loss"] == min(losses[step] for step in found if step != best)


def test_a_best_checkpoint_lost_before_a_longer_run_does_not_change_its_rows(train):
    pairs = ("optimizer.learning_rate=0.2", "optimizer.clip=null", "schedule.checkpoint_epochs=1")
    whole = train("schedule.epochs=12", *pairs, name="whole")
    short = train("schedule.epochs=10", *pairs, name="short")
    best = result(short)["best_step"]
    assert best < result(short)["steps"]
    damage(short, best)
    assert rows(train("schedule.epochs=12", *pairs, name="short")) == rows(whole)


def test_a_resumed_run_does_not_write_again_the_checkpoint_it_came_from(train):
    directory = train("schedule.epochs=2")
    (directory / "result.json").unlink()
    last = checkpoint.path_of(directory / "checkpoints", checkpoint.steps(directory / "checkpoints")[-1])
    before = last.stat().st_ino, last.stat().st_mtime_ns
    train("schedule.epochs=2")
    assert (last.stat().st_ino, last.stat().st_mtime_ns) == before


def test_an_only_checkpoint_caught_between_two_names_is_resumed(train, same_run, whole):
    root = train("schedule.max_steps=31", name="hurt") / "checkpoints"
    *others, last = checkpoint.steps(root)
    for step in others:
        shutil.rmtree(checkpoint.path_of(root, step))
    checkpoint.path_of(root, last).rename(root / f".step-{last:08d}.replaced")
    train(name="hurt")
    assert rows(root.parent) == rows(whole)


def test_a_checkpoint_of_another_network_is_refused_by_name(train, monkeypatch):
    directory = train("schedule.max_steps=5")
    last = checkpoint.steps(directory / "checkpoints")[-1]
    load = Method.load_state_dict
    monkeypatch.setattr(Method, "load_state_dict", lambda method, state: load(method, {**state, "model": {}}))
    says = rf"step-{last:08d} does not fit this network or trainer \(RuntimeError.*--no-resume"
    with pytest.raises(UserError, match=says) as caught:
        train()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_an_entry_is_refused_by_name(train):
    directory = train("schedule.max_steps=5")
    root = directory / "checkpoints"
    step = checkpoint.steps(root)[-1]
    state = checkpoint.read(checkpoint.path_of(root, step))
    del state["valid_steps"]
    checkpoint.write(root, step, state, 0)
    with pytest.raises(UserError, match=rf"step-{step:08d} does not fit .*KeyError: 'valid_steps'"):
        train()


def test_if_every_checkpoint_is_damaged_the_error_says_what_to_do(train):
    directory = train("schedule.max_steps=50")
    for step in checkpoint.steps(directory / "checkpoints"):
        damage(directory, step)
    with pytest.raises(UserError, match=r"every checkpoint under .*--no-resume"):
        train()


def test_a_lost_metrics_file_is_noticed(train):
    directory = train("schedule.max_steps=50")
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl holds fewer than the \d+ rows.*--no-resume"):
        train()


def test_a_lost_config_is_noticed(train):
    directory = train("schedule.max_steps=50")
    (directory / "config.yaml").unlink()
    with pytest.raises(UserError, match="has no config"):
        train()


def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_it(train, make_config):
    pairs = ("optimizer.learning_rate=1e6", "optimizer.momentum=0", "optimizer.clip=null")
    with pytest.raises(Diverged, match=r"training loss is nan at step 2 .*dropout 0.3.*lower optimizer.learning_rate"):
        train(*pairs)
    root = make_config(*pairs).directory
    _, state = checkpoint.read_newest(checkpoint.Path(root) / "checkpoints", "cpu", print)
    assert all(torch.isfinite(weight).all() for weight in state["method"]["model"].values())


def test_a_step_that_is_not_finite_ends_the_run_at_once_and_says_what_it_was(train, monkeypatch):
    def poisoned(model, batch, hyper, loss=classification_loss):
        return loss(model, batch, hyper) + 0 * (0 * hyper["weight_decay"]).sqrt().sum()

    monkeypatch.setattr("stn_fast.training.task.classification_loss", poisoned)
    with pytest.raises(
        Diverged, match=r"the gradient of hyperparameter 'weight_decay' is not finite at validation step"
    ):
        train()


def test_an_evaluation_leaves_a_frozen_module_frozen(make_config, tmp_path):
    config = make_config()
    task = digits.build(config)
    trainer = Trainer(config, task, build_method(config, task), tmp_path / "checkpoints")
    task.model.linear_1.eval()
    trainer.evaluate(task.data.valid)
    assert task.model.training
    assert not task.model.linear_1.training


def test_an_evaluation_in_batches_of_ones_own_keeps_what_its_scores_return(make_config, tmp_path):
    config, batching = make_config("schedule.eval_batch_size=100"), SummingExamples()
    task = digits.build(config)
    method = build_method(config, task)
    plain = Trainer(config, task, method, tmp_path).evaluate(task.data.valid)
    task = replace(task, batching=batching, scores=batching.scores)
    assert Trainer(config, task, method, tmp_path).evaluate(task.data.valid) == plain
    assert batching.kept.value.item() == pytest.approx(plain["loss"] * task.data.valid.examples, rel=1e-5)


def test_a_run_leaves_the_number_of_threads_as_it_was(train):
    before = torch.get_num_threads()
    directory = train("schedule.epochs=1", f"threads={before + 1}")
    assert torch.get_num_threads() == before
    assert result(directory)["versions"]["threads"] == before + 1


def test_a_device_that_is_not_there_is_refused(make_config):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=r"device \(--device\) = 'cuda'"):
        run(make_config("device=cuda"), digits.build)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("schedule.valid_batch_size=401", "schedule.valid_batch_size = 401: must be at most 400"),
        ("hyperparameters.input_dropout.high=1", "'input_dropout' is a dropout rate"),
        ("hyperparameters.input_noise.scale=9", "scale = 9"),
    ],
)
def test_what_the_model_or_the_data_cannot_take_is_a_users_error(train, pair, says):
    with pytest.raises(UserError, match=says):
        train(pair)


def test_a_run_reports_on_every_row(make_config):
    said = []
    progress = Progress(quiet=True)
    progress.row = said.append
    config = make_config("schedule.epochs=1")
    run(config, digits.build, progress=progress)
    assert [row["phase"] for row in said] == ["eval", "train", "eval"]


@pytest.mark.parametrize("response", ["raw", "value"])
def test_the_published_responses_train_too(train, response):
    found = rows(train(f"method.response={response}", "optimizer.learning_rate=0.01"))
    assert found[-1]["loss"] < found[0]["loss"]


def test_self_tuning_beats_fixed_and_frozen_hyperparameters(train):
    longer = partial(train, "schedule.epochs=40", "schedule.checkpoint_epochs=40")
    tuned, fixed = result(longer(name="stn")), result(longer("method.name=fixed", name="fixed"))
    frozen = result(longer("method.freeze=true", name="frozen"))
    assert tuned["valid_loss"] < 0.6 * fixed["valid_loss"]
    assert tuned["valid_loss"] < 0.6 * frozen["valid_loss"]
    assert sum(abs(moved) > 1 for moved in tuned["moved_in_initial_scales"].values()) >= 3
    assert set(fixed["moved_in_initial_scales"].values()) == {0.0}
    assert set(frozen["moved_in_initial_scales"].values()) == {0.0}


def test_a_copied_run_directory_resumes_like_the_original(train, same_run, whole):
    short = train("schedule.max_steps=31", name="short")
    shutil.copytree(short, short.with_name("copy"))
    same_run(whole, train(name="copy"))


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ("stn", 1),
        ("stn method.antithetic=true", 2),
        ("stn method.antithetic=true method.freeze=true", 2),
        ("delta-stn", 2),
        ("delta-stn method.antithetic=true", 3),
        ("one-pass", 1),
        ("fixed", 1),
    ],
)
def test_the_counted_examples_are_those_that_the_steps_have_read(make_config, method, passes):
    read = {"train": 0, "valid": 0}

    def build(config):
        task, kinds = digits.build(config), {"training_objective": "train", "validation_objective": "valid"}

        def counting(objective, kind):
            def count(model, batch, hyper):
                read[kind] += len(batch.targets)
                return objective(model, batch, hyper)

            return count

        return replace(task, **{name: counting(getattr(task, name), kind) for name, kind in kinds.items()})

    config = make_config(*f"method.name={method}".split(), "schedule.epochs=4")
    got = run(config, build)
    rehearsed = 2  # of the first forward pass, before any step
    assert got["train_examples"] == read["train"] - rehearsed == 4 * 900 * passes
    assert got["valid_examples"] == read["valid"] == 100 * got["valid_steps"]
    last = rows(Path(config.directory))[-1]
    assert (last["train_examples"], last["valid_examples"]) == (got["train_examples"], got["valid_examples"])


def test_cpu_time_is_that_of_the_process_and_is_kept_when_a_run_goes_on(train, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    directory = train("schedule.max_steps=20")
    first = result(directory, timeless=False)["cpu_seconds"]
    monkeypatch.setattr(time, "process_time", lambda: 1e9 + next(clock))  # another process
    train("schedule.max_steps=40")
    seconds = [row["cpu_seconds"] for row in rows(directory, timeless=False)]
    assert 0 < first < result(directory, timeless=False)["cpu_seconds"] < 1000
    assert seconds == sorted(seconds)
    assert seconds[-1] < 1000


class SlowParts:
    """A CPU clock that a training step advances by 1 s, a validation step by 10 s, anything else by hours."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "process_time", lambda: self.now)
        for owner, name, seconds in (
            (SelfTuning, "train_step", 1.0),
            (SelfTuning, "valid_step", 10.0),
            (Trainer, "evaluate", 1e4),
            (checkpoint, "write_encoded", 1e6),
        ):
            monkeypatch.setattr(owner, name, self.slowed(getattr(owner, name), seconds))
        begin = Saving.begin
        monkeypatch.setattr(Saving, "begin", lambda saving, *given: (begin(saving, *given), saving.settle()))
        monkeypatch.setattr(Saving, "cpu_seconds", 0.0)  # not the real one

    def slowed(self, function, seconds):
        def call(*arguments, **options):
            self.now += seconds
            return function(*arguments, **options)

        return call


def test_the_cpu_time_of_steps_is_without_evaluations_and_checkpoints(train, monkeypatch):
    SlowParts(monkeypatch)
    directory = train("schedule.epochs=5")
    found = result(directory, timeless=False)
    expected = found["steps"] + 9 * found["valid_steps"]
    assert found["valid_steps"] > 0
    assert found["step_cpu_seconds"] == expected
    evaluations = [row for row in rows(directory, timeless=False) if row["phase"] == "eval"]
    assert [row["step_cpu_seconds"] for row in evaluations][::5] == [0, expected]


def test_the_cpu_time_of_steps_goes_on_where_a_run_was_stopped(train, monkeypatch):
    SlowParts(monkeypatch)
    whole = result(train("schedule.max_steps=40", name="whole"), timeless=False)
    train("schedule.max_steps=20", name="stopped")
    stopped = result(train("schedule.max_steps=40", name="stopped"), timeless=False)
    assert stopped["step_cpu_seconds"] == whole["step_cpu_seconds"] > 0


def test_a_run_that_diverges_in_an_evaluation_has_the_cpu_time_of_its_steps(make_config, monkeypatch):
    clock, evaluate = SlowParts(monkeypatch), Trainer.evaluate

    def failing(trainer, *given):
        scores = evaluate(trainer, *given)
        return {**scores, "loss": math.nan} if trainer.step else scores

    monkeypatch.setattr(Trainer, "evaluate", failing)
    with pytest.raises(Diverged) as error:
        run(make_config("schedule.epochs=2"), digits.build)
    assert clock.now > 1e4
    assert error.value.compute["step_cpu_seconds"] == 9


def test_a_run_that_diverges_tells_the_compute_it_took(make_config):
    with pytest.raises(Diverged) as error:
        run(make_config("optimizer.learning_rate=1e30", "optimizer.clip=null", "schedule.epochs=2"), digits.build)
    compute = error.value.compute
    times = {"wall_seconds", "cpu_seconds", "step_cpu_seconds"}
    assert set(compute) == {*times, "train_examples", "valid_examples"}
    assert 0 < compute["step_cpu_seconds"] < compute["cpu_seconds"]
    assert 0 < compute["train_examples"] < 2 * 900
