"""metrics.jsonl: one JSON object per line; a "train", a "valid" and an "eval" row for every epoch.

Every row has the ``wall_seconds`` and the ``cpu_seconds`` (of all threads) of the run so far. "eval" rows also have
the ``step_cpu_seconds``, without evaluations and checkpoints, and the ``train_examples`` and ``valid_examples`` that
steps have read: words of a text, and twice for a step of two passes.

A score that is not finite, such as a perplexity too large for a float, is null.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from stn_fast.errors import UserError
from stn_fast.files import exists, read_bytes, sync
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.training.disk import writing
from stn_fast.values import from_json, to_json

# Only these keys may differ between two runs of one seed.
TIMES = (
    "wall_seconds",
    "cpu_seconds",
    "step_cpu_seconds",
    "examples_per_second",
    "steps_per_second",
    "peak_bytes",
    "captured",
)


class MetricsLog:
    """Appends rows to ``path`` after its first ``rows`` rows; any later ones are removed.

    Raises:
        UserError: the file cannot be read, or holds fewer rows.
        CannotWrite: here and below, the disk is full or cannot be written.
    """

    def __init__(self, path: Path, rows: int = 0) -> None:
        size = size_of(path, rows)
        self.path, self.rows = path, rows
        with writing(path):
            self._file = path.open("ab")
            self._file.truncate(size)
            sync(path.parent)

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row, which is on the disk after the next ``sync``."""
        with writing(self.path):
            self._file.write(to_json(row).encode() + b"\n")
            self._file.flush()
        self.rows += 1

    def sync(self) -> None:
        """Returns once every row so far is on the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with writing(self.path):
            self._file.close()


class NoLog:
    """What a process that writes no metrics has in place of a `MetricsLog`: it counts the rows."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows

    def write(self, row: dict[str, Any]) -> None:
        self.rows += 1

    def sync(self) -> None:
        pass

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def size_of(path: Path, rows: int) -> int:
    """The size of the first ``rows`` rows of the file in bytes.

    Raises:
        UserError: the file cannot be read, holds fewer rows, or one of them is damaged.
    """
    lines = read_bytes(path).splitlines(keepends=True)[:rows] if rows and exists(path) else []
    if len(lines) < rows or (lines and not lines[-1].endswith(b"\n")):
        raise UserError(
            f"{path} holds fewer than the {rows} rows written before the checkpoint; "
            "restore it, or start over with --no-resume"
        )
    for number, line in enumerate(lines, start=1):
        if not _is_row(line):
            raise UserError(f"line {number} of {path} is damaged; restore it, or start over with --no-resume")
    return sum(map(len, lines))


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(from_json(line), dict)
    except ValueError:
        return False


class MeanLoss:
    """The mean loss of the steps since the last report, summed on the device in float64 without reading it back."""

    def __init__(self, device: torch.device | str) -> None:
        self.total, self.steps = torch.zeros((), dtype=torch.float64, device=device), 0

    def add(self, loss: Tensor) -> None:
        """Counts one step's loss."""
        self.total += loss
        self.steps += 1

    def take(self) -> tuple[float, int]:
        """Returns (mean loss, number of steps) and resets both."""
        mean, steps = self.total.item() / max(self.steps, 1), self.steps
        self.total.zero_()
        self.steps = 0
        return mean, steps

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.copy_(state["total"])
        self.steps = state["steps"]


def describe(space: HyperparameterSpace, location: Tensor, scales: Tensor) -> dict[str, dict[str, float]]:
    """The entries of a row about the hyperparameters, each by name.

    ``hyperparameters`` are constrained values at the location λ, ``scales`` σ in unconstrained units,
    ``hyperparameters_low`` and ``_high`` the constrained values at λ ∓ σ.
    """
    location, scales = location.detach(), scales.detach()
    return {
        "hyperparameters": space.values(location),
        "scales": dict(zip(space.names, scales.tolist(), strict=True)),
        "hyperparameters_low": space.values(location - scales),
        "hyperparameters_high": space.values(location + scales),
    }
