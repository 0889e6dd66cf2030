"""What surrounds the loop: the rehearsal before it, the pace that is reported after it, and data in host memory."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_files import result, rows
from torch import nn

from stn_fast import dispatch
from stn_fast.data import digits as digits_data
from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training.config import HyperparameterConfig
from stn_fast.training.progress import Progress, summary
from stn_fast.training.run import checked_task, run
from stn_fast.training.task import outputs
from stn_fast.training.trainer import Trainer


class Normalised(nn.Module):
    """Normalises over the batch, then calls ``network``."""

    def __init__(self, network):
        super().__init__()
        self.norm, self.network = nn.BatchNorm1d(64), network

    def forward(self, x, hyper):
        return outputs(self.network, hyper, self.norm(x))


def build_normalised(config):
    task = digits.build(config)
    return replace(task, model=Normalised(task.model))


def test_a_network_that_normalises_over_the_batch_is_rehearsed_and_keeps_nothing_of_it(make_config):
    norm = checked_task(make_config(), build_normalised).model.norm
    assert torch.equal(norm.running_mean, torch.zeros(64))
    assert torch.equal(norm.running_var, torch.ones(64))
    assert norm.num_batches_tracked == 0


def test_a_network_with_a_buffer_that_can_not_be_written_is_rehearsed(make_config):
    def build(config):
        task = digits.build(config)
        task.model.register_buffer("ones", torch.ones(1).expand(3))
        return task

    assert checked_task(make_config(), build).model.ones.tolist() == [1, 1, 1]


def test_a_batch_of_one_is_refused_before_training_where_it_cannot_be_normalised(make_config):
    with pytest.raises(UserError, match="more than 1 value per channel"):
        checked_task(make_config("schedule.batch_size=1"), build_normalised)
    checked_task(make_config("schedule.batch_size=1"), digits.build)


def test_a_network_that_normalises_over_the_batch_resumes_to_the_same_numbers(make_config, same_run):
    whole, parts = make_config(name="whole"), make_config(name="parts")
    run(whole, build_normalised)
    run(replace(parts, schedule=replace(parts.schedule, max_steps=40)), build_normalised)
    run(parts, build_normalised)
    same_run(Path(whole.directory), Path(parts.directory))


def test_the_pace_counts_the_steps_and_not_the_evaluations(make_config, monkeypatch):
    advance, evaluate, slept = Trainer._advance, Trainer.evaluate, []

    def slow_step(trainer):
        time.sleep(0.01)
        slept.append(1)
        advance(trainer)

    def slower_evaluation(trainer, split):
        time.sleep(0.2)
        return evaluate(trainer, split)

    monkeypatch.setattr(Trainer, "_advance", slow_step)
    monkeypatch.setattr(Trainer, "evaluate", slower_evaluation)
    got = run(make_config("schedule.max_steps=30"), digits.build)
    assert len(slept) == got["steps"] == 30
    assert got["wall_seconds"] > 30 * 0.01 + 8 * 0.2
    assert 30 / (got["wall_seconds"] - 8 * 0.2) < got["steps_per_second"] < 100
    assert f"30 steps at {got['steps_per_second']:.4g} a second, ended by schedule.max_steps" in summary(got)


class Recorder(Progress):
    """What a run has said of its way."""

    def __init__(self):
        super().__init__(quiet=True)
        self.passes, self.said = [], []

    def step(self, passes):
        self.passes.append(passes)

    def say(self, text):
        self.said.append(text)


def test_a_run_shows_every_step_and_a_resumed_one_starts_where_it_was(make_config):
    first, second = Recorder(), Recorder()
    run(make_config("schedule.max_steps=10"), digits.build, progress=first)
    run(make_config("schedule.max_steps=14"), digits.build, progress=second)
    assert first.start == 0
    assert first.passes == [step / 9 for step in range(1, 11)]
    assert second.start == 10 / 9
    assert second.passes == [step / 9 for step in range(11, 15)]


@pytest.mark.parametrize(("name", "trained"), [("stn", 175224), ("fixed", 85002)])
def test_a_run_says_what_it_learns_from(make_config, name, trained):
    progress = Recorder()
    run(make_config("schedule.max_steps=1", f"method.name={name}"), digits.build, progress=progress)
    assert progress.said[0] == (
        f"digits, {name}: 900 training, 400 validation, 497 test examples; {trained:,} trained parameters; "
        "9 training steps an epoch"
    )


def test_a_run_without_a_validation_step_says_that_nothing_is_tuned_and_a_fixed_one_need_not(make_config):
    says = "no validation step was run"
    assert says in summary(run(make_config("schedule.max_steps=1"), digits.build))
    assert says not in summary(run(make_config("schedule.max_steps=40", name="tuned"), digits.build))
    fixed = make_config("schedule.max_steps=1", "method.name=fixed", name="fixed")
    assert says not in summary(run(fixed, digits.build))


def test_a_fraction_of_the_training_set_makes_shorter_epochs_and_leaves_the_other_splits(make_config):
    task = checked_task(make_config("train_fraction=0.5"), digits.build)
    whole = digits_data.load()
    assert [len(split.inputs) for split in task.data] == [450, 400, 497]
    kept = {tuple(example) for example in whole.train.inputs.tolist()}
    assert all(tuple(example) in kept for example in task.data.train.inputs.tolist())
    assert torch.equal(task.data.test.inputs, whole.test.inputs)


def test_a_fraction_smaller_than_a_batch_is_refused(make_config):
    with pytest.raises(UserError, match=r"schedule.batch_size = 100: must be at most 90"):
        checked_task(make_config("train_fraction=0.1"), digits.build)


def test_rmsprop_moves_the_hyperparameters_and_resumes_to_the_same_numbers(train, same_run):
    whole = train("hyper_optimizer.name=rmsprop", name="whole")
    train("hyper_optimizer.name=rmsprop", "schedule.max_steps=45", name="parts")
    same_run(whole, train("hyper_optimizer.name=rmsprop", name="parts"))
    adam = train(name="adam")
    warmup = 5  # rows: the evaluation before training, then two epochs of warm-up, without a validation step
    assert rows(whole)[:warmup] == rows(adam)[:warmup]
    assert result(whole)["hyperparameters_end"] != result(adam)["hyperparameters_end"]


@pytest.fixture
def without(monkeypatch):
    """without("module") makes its import fail, as on a machine that lacks it."""

    def forget():
        dispatch._import_failure.cache_clear()
        dispatch._automatic.cache_clear()

    with monkeypatch.context() as patch:
        yield lambda module: (patch.setitem(sys.modules, module, None), forget())
    forget()


def test_a_run_without_the_core_says_so_in_its_first_line_and_its_result(make_config, without):
    without("stn_fast._C")
    progress = Recorder()
    got = run(make_config("schedule.max_steps=1"), digits.build, progress=progress)
    assert "; using the slow backend 'reference': the C++ core stn_fast._C does not import (" in progress.said[0]
    assert got["versions"]["backend"] == "reference"


def test_a_run_on_the_backend_that_was_asked_for_says_so(make_config):
    progress = Recorder()
    with dispatch.use_backend("reference"):
        got = run(make_config("schedule.max_steps=1"), digits.build, progress=progress)
    assert "slow backend 'reference': use_backend('reference') asks for it" in progress.said[0]
    assert got["versions"]["backend"] == "reference"
    again = run(make_config("schedule.max_steps=1", name="again"), digits.build, progress=progress)
    assert again["versions"]["backend"] == "cpp"
    assert "backend" not in progress.said[-1]


def test_the_first_line_of_a_run_names_a_precision_below_float32(make_config):
    progress = Recorder()
    run(make_config("schedule.max_steps=1", "precision=bf16"), digits.build, progress=progress)
    assert progress.said[0].endswith("; matrix products in bf16")
    run(make_config("schedule.max_steps=1", name="fp32"), digits.build, progress=progress)
    assert "products" not in progress.said[-1]


def test_without_a_call_that_tells_the_memory_a_run_ends_well(make_config, without):
    without("resource")
    got = run(make_config("schedule.max_steps=1"), digits.build)
    assert got["peak_bytes"] is None
    assert "MB" not in summary(got)
    assert run(make_config("schedule.max_steps=1"), digits.build) == got  # read back


def test_a_hyperparameter_that_the_task_does_not_use_is_a_users_error(tmp_path):
    config = digits.config()
    unused = {**config.hyperparameters, "hiden_dropout_1": HyperparameterConfig(init=0.3, low=0.0, high=0.9)}
    with pytest.raises(UserError, match="nothing uses 'hiden_dropout_1'"):
        run(replace(config, hyperparameters=unused, run_dir=str(tmp_path / "run")), digits.build)

    only = {"hiden_dropout_1": unused["hiden_dropout_1"]}
    with pytest.raises(UserError, match="nothing uses 'hiden_dropout_1'"):
        run(replace(config, hyperparameters=only, run_dir=str(tmp_path / "run")), digits.build)

    def build(config):
        return replace(digits.build(config), allow_unused=True)

    schedule = replace(config.schedule, max_steps=2)
    run(replace(config, hyperparameters=unused, schedule=schedule, run_dir=str(tmp_path / "run")), build)
