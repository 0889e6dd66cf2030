"""Loggers show every row of metrics.jsonl once, also after a kill, and change nothing in the run."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec

import logged
import pytest
import torch
import torch.nn.functional as F
from run_files import Warnings, result, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn
from stn_fast.errors import UserError
from stn_fast.extras import EXTRAS
from stn_fast.recipes import digits
from stn_fast.training.config import LOGGERS, Config, ConfigError
from stn_fast.training.layering import build, resolve, to_yaml
from stn_fast.training.loggers import Loggers, read_record
from stn_fast.training.run import run
from stn_fast.values import from_yaml

KILLED = """
import os, signal, sys, time
from stn_fast import train
from stn_fast.training.trainer import Trainer
save = Trainer._save
def save_or_die(self, log):
    if self.step == int(sys.argv[1]):
        time.sleep(1)  # in which W&B writes what it has to the disk
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, log)
Trainer._save = save_or_die
sys.exit(train.main(sys.argv[2:]))
"""
SETTINGS = ("schedule.checkpoint_epochs=2", "method.warmup_epochs=1", "schedule.batch_size=300", "threads=1")
EPOCHS = 6


class Recorder:
    """A logger that notes its calls."""

    def __init__(self, fails=""):
        self.fails, self.calls, self.rows = fails, [], []

    def _note(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise OSError(28, "no space")

    def start(self, config, directory, rows):
        self.directory, self.before = directory, len(rows)
        self.rows += rows
        self._note("start")

    def row(self, row):
        self.rows.append(dict(row))
        self._note("row")
        row.clear()  # which changes nothing in the run

    def result(self, result):
        self.scores = result
        self._note("result")

    def close(self):
        self._note("close")


def config_of(directory, *pairs):
    flags = {"run_dir": str(directory), "schedule.epochs": EPOCHS}
    return resolve(digits.config(), pairs=[*SETTINGS, *pairs], flags=flags)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run that was killed at the end of an epoch, after rows that its last checkpoint lacks, and then resumed."""
    missing = [name for name in LOGGERS if find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    directory, progress = tmp_path_factory.mktemp("loggers") / "run", Warnings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory.parent}/mlflow.db")
        settings = [f"loggers=[{','.join(LOGGERS)}]", *SETTINGS, f"schedule.epochs={EPOCHS}"]
        arguments = [word for pair in settings for word in ("--set", pair)]
        command = [sys.executable, "-c", KILLED, "12", "digits", "--run-dir", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert "warning" not in done.stderr
        assert rows(directory)[-1]["step"] == 12
        run(config_of(directory, *settings), digits.build, progress=progress)
    assert progress.warnings == []
    return directory


@pytest.mark.parametrize("name", LOGGERS)
def test_a_killed_and_resumed_run_has_every_row_once(directory, name):
    more = (f"sqlite:///{directory.parent}/mlflow.db",) if name == "mlflow" else ()
    found = getattr(logged, f"of_{name}")(directory, *more)
    expected = logged.of_metrics(directory)
    assert len(expected["eval/loss"]) == 1 + EPOCHS
    assert "eval/hyperparameters/weight_decay" in expected
    timed = {key for key in expected if "seconds" in key or "per_second" in key}
    assert {key: [step for step, _ in points] for key, points in found.items()} == {
        key: [step for step, _ in points] for key, points in expected.items()
    }
    for key in expected.keys() - timed:
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in expected[key]], rel=1e-6)


def test_the_result_and_the_configuration_are_shown(directory):
    mlflow = pytest.importorskip("mlflow")
    shown = mlflow.MlflowClient(f"sqlite:///{directory.parent}/mlflow.db").get_run(
        json.loads((directory / "mlflow.json").read_text())["run"]
    )
    assert shown.data.metrics["result/test_accuracy"] == result(directory)["test_accuracy"]
    assert shown.data.params["schedule.batch_size"] == "300"
    assert shown.info.status == "FINISHED"


def test_a_users_logger_gets_every_row_once_and_at_a_resumption_those_before(tmp_path):
    first, second = Recorder(), Recorder()
    run(config_of(tmp_path / "run", "schedule.max_steps=12"), digits.build, loggers=[first])
    assert first.before == 0
    assert first.calls == ["start", *["row"] * len(rows(first.directory)), "result", "close"]
    run(config_of(tmp_path / "run"), digits.build, loggers=[second])
    assert second.before > 0
    assert second.rows == rows(second.directory, timeless=False)
    assert second.scores == result(second.directory, timeless=False)
    third = Recorder()
    run(config_of(tmp_path / "run"), digits.build, loggers=[third])  # finished
    assert third.calls == []


@pytest.mark.parametrize("fails", ["start", "row", "result", "close"])
def test_a_logger_that_fails_is_a_warning_and_changes_nothing(tmp_path, plain, fails):
    progress, broken, other = Warnings(), Recorder(fails), Recorder()
    run(config_of(tmp_path / "run"), digits.build, progress=progress, loggers=[broken, other])
    assert rows(tmp_path / "run") == rows(plain)
    assert result(tmp_path / "run") == result(plain)
    [warning] = progress.warnings
    assert "Recorder failed and is not called again (OSError: [Errno 28] no space); the run goes on" in warning
    assert broken.calls.count(fails) == 1
    assert broken.calls[-1] == fails
    assert other.calls[-2:] == ["result", "close"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without loggers."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    run(config_of(directory), digits.build)
    return directory


def test_loggers_change_no_number(directory, plain):
    assert rows(directory) == rows(plain)
    assert result(directory) == result(plain)


def test_a_run_that_starts_over_is_another_one_in_tensorboard_too(tmp_path):
    pytest.importorskip("tensorboard")
    for epochs in (3, 2):
        pairs = ["loggers=[tensorboard]", f"schedule.max_steps={5 * epochs}"]
        run(config_of(tmp_path / "run", *pairs), digits.build, resume=False)
    found = logged.of_tensorboard(tmp_path / "run")["eval/loss"]
    assert [step for step, _ in found] == [step for step, _ in logged.of_metrics(tmp_path / "run")["eval/loss"]]


def test_a_logger_is_closed_after_an_error(tmp_path):
    logger = Recorder()

    def fail(row):
        raise KeyboardInterrupt

    logger.row = fail
    with pytest.raises(KeyboardInterrupt):
        run(config_of(tmp_path / "run"), digits.build, loggers=[logger])
    assert logger.calls == ["start", "close"]


def test_numbers_that_are_not_finite_are_none_as_in_the_file():
    logger = Recorder()
    logger.row = logger.rows.append
    Loggers([logger], pytest.fail).row({"phase": "eval", "loss": float("inf"), "step": 1})
    assert logger.rows[-1] == {"phase": "eval", "loss": None, "step": 1}


def test_only_the_first_process_calls_loggers(tmp_path, monkeypatch):
    monkeypatch.setattr("stn_fast.training.run.first_of", lambda processes: False)
    logger = Recorder()
    run(config_of(tmp_path / "run", "schedule.max_steps=2"), digits.build, loggers=[logger])
    assert logger.calls == []


def trained(directory, loggers):
    x = torch.randn(12, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 6)
    tuned = stn.convert(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.3)), quiet=True)
    how = dict(loss=F.cross_entropy, optimizer=torch.optim.Adam, epochs=1, quiet=True)
    return stn.fit(tuned, loader, loader, run_dir=directory, loggers=loggers, **how)


def test_fit_takes_names_and_objects(tmp_path, monkeypatch):
    logger = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is missing: pip install 'stn-fast\[wandb\]'"):
        trained(tmp_path, loggers=["wandb", logger])
    trained(tmp_path, loggers=[logger])
    assert logger.calls[-2:] == ["result", "close"]
    with pytest.raises(UserError, match=r"'wanb': did you mean 'wandb'"):
        trained(tmp_path, loggers=["wanb"])
    with pytest.raises(TypeError, match="must be an object with the method start"):
        trained(tmp_path, loggers=[print])
    with pytest.raises(TypeError, match="must be an object with the method start"):
        trained(tmp_path, loggers=[Recorder])
    with pytest.raises(TypeError, match="must be a list of names and objects, got 'wandb'"):
        trained(tmp_path, loggers="wandb")


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("loggers=[tensorbord]", "did you mean 'tensorboard'"),
        ("loggers=[x]", "known: tensorboard, wandb, mlflow"),
        ("loggers=[wandb, wandb]", "must name each logger once"),
        ("loggers=wandb", r"must be a list, such as \[wandb\]"),
        ("loggers=[1]", "must be text"),
    ],
)
def test_wrong_names_are_errors(tmp_path, pair, said):
    with pytest.raises(ConfigError, match=said):
        config_of(tmp_path, pair)


def test_a_configuration_with_loggers_is_read_back(tmp_path):
    config = config_of(tmp_path, "loggers=[wandb, mlflow]")
    assert build(Config, from_yaml(to_yaml(config))) == config


def test_each_logger_has_an_extra():
    assert {name: EXTRAS[name] for name in LOGGERS} == {name: name for name in LOGGERS}


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "wandb.json").write_text("[]")
    with pytest.raises(UserError, match=r"wandb.json does not name a run; restore it, or remove it"):
        read_record(tmp_path / "wandb.json")
