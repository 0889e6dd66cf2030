"""Reads and checks a run directory: its configuration and its rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stn_fast.errors import UserError
from stn_fast.files import expanded, is_directory, is_file, read_text
from stn_fast.training.config import Config
from stn_fast.training.layering import build, read_yaml
from stn_fast.values import from_json

Row = dict[str, Any]

SCORES = ("test_loss", "test_accuracy", "test_perplexity")
BY_NAME = ("hyperparameters", "hyperparameters_low", "hyperparameters_high")


class Run(NamedTuple):
    """A run directory's configuration and its rows by phase."""

    name: str
    config: Config
    rows: dict[str, list[Row]]

    @property
    def best(self) -> Row:
        """The evaluation with the lowest validation loss."""
        return min((row for row in self.rows["eval"] if math.isfinite(row["loss"])), key=lambda row: row["loss"])

    @property
    def loss_unit(self) -> str:
        """The unit of the losses; empty if the task has none."""
        return self.rows["eval"][0].get("loss_unit", "")


def read_run(directory: str | Path) -> Run:
    """The run in ``directory``. Numbers are floats, with NaN for null.

    Raises:
        UserError: there is no such directory, it holds no run or a damaged one, or the run has no evaluation yet.
    """
    path = expanded(directory, "RUN_DIR")
    metrics = path / "metrics.jsonl"
    if not is_directory(path):
        raise UserError(f"there is no run directory {path}; python -m stn_fast.train makes one under runs/")
    if not is_file(metrics):
        raise UserError(f"{path} holds no metrics.jsonl; name a directory that python -m stn_fast.train has written")
    lines = read_text(metrics).splitlines()
    rows: dict[str, list[Row]] = {"train": [], "valid": [], "eval": []}
    for number, line in enumerate(lines, start=1):
        try:
            row = _row(line)
            rows[row["phase"]].append(row)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            raise UserError(f"line {number} of {metrics} is not a row of metrics; remove it") from None
    if not any(math.isfinite(row["loss"]) for row in rows["eval"]):
        raise UserError(f"{metrics} holds no evaluation yet; let the run finish its first epoch")
    config = build(Config, read_yaml(str(path / "config.yaml")))
    for name in config.enabled:
        if any(name not in row[part] for row in rows["eval"] for part in BY_NAME):
            raise UserError(f"{metrics} lacks the hyperparameter {name!r} of config.yaml; restore one of the two files")
    return Run(path.name or str(path), config, rows)


def read_runs(directories: Sequence[str | Path], warn: Callable[[str], None]) -> list[Run]:
    """The runs in ``directories``; for each directory without a valid run, ``warn`` is called with the reason.

    Raises:
        UserError: no directory holds a valid run.
    """
    if len(directories) == 1:
        return [read_run(directories[0])]
    runs = []
    for directory in directories:
        try:
            runs.append(read_run(directory))
        except UserError as error:
            warn(str(error))
    if not runs:
        raise UserError(f"none of the {len(directories)} directories holds a run that can be plotted")
    return runs


def _row(line: str) -> Row:
    row = from_json(line)
    checked: Row = {"epoch": _number(row["epoch"]), "loss": _number(row["loss"])}
    if not (math.isfinite(checked["epoch"]) and checked["epoch"] >= 0):
        raise ValueError("epoch")
    checked |= {key: _number(row[key]) for key in SCORES if key in row}
    if row["phase"] == "eval":
        checked |= {part: {name: _number(row[part][name]) for name in row[part]} for part in BY_NAME}
        if not isinstance(row.get("loss_unit", ""), str):
            raise TypeError("loss_unit")
    return {**row, **checked}


def _number(value: Any) -> float:
    """A number of metrics.jsonl; NaN for null, which stands for numbers that are not finite."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is not a number")
    return float(value) if value is not None and math.isfinite(value) else math.nan
