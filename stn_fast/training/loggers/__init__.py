"""Loggers: they show the rows of metrics.jsonl elsewhere, and change nothing in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from stn_fast.errors import UserError
from stn_fast.extras import require
from stn_fast.files import read_bytes
from stn_fast.training.config import LOGGERS, Config
from stn_fast.values import finite, from_json

Row = dict[str, Any]
METHODS = ("start", "row", "result", "close")


class Logger(Protocol):
    """What `stn_fast.fit` and `run` accept as a logger.

    Only the first of several processes calls it. An exception in it is a warning, and the run goes on without it.
    """

    def start(self, config: Config, directory: Path, rows: Sequence[Row], /) -> None:
        """Called before the first step, with the rows of ``metrics.jsonl`` that a resumed run keeps, else with none.

        Later rows of the process before, which the run computes again, must be overwritten or not shown twice.
        """

    def row(self, row: Row, /) -> None:
        """Called with each row of ``metrics.jsonl`` once it is written, with None for numbers that are not finite."""

    def result(self, result: dict[str, Any], /) -> None:
        """Called with the contents of ``result.json``, if the run ends."""

    def close(self) -> None:
        """Called at the end, also after an error or a signal."""


def check_logger(logger: Any) -> None:
    """Raises TypeError if an object given as a logger lacks a method of one."""
    missing = [name for name in METHODS if isinstance(logger, type) or not callable(getattr(logger, name, None))]
    if missing:
        raise TypeError(f"loggers: {logger!r} must be an object with the method {missing[0]}, or one of {LOGGERS}")


def named_loggers(names: Sequence[str]) -> list[Logger]:
    """A logger of each name in ``config.loggers``.

    Raises:
        UserError: a package is missing; the message says how to install it.
    """
    for name in names:
        require(name)
    modules = {name: import_module(f"{__name__}.{name}") for name in names}
    return [modules[name].make() for name in names]


class Loggers:
    """Calls every logger; drops one that fails, and calls ``warn`` with the reason.

    It starts inside ``started``, and closes them at its end.
    """

    def __init__(self, loggers: Sequence[Logger], warn: Callable[[str], None]) -> None:
        self._working, self.warn = list(loggers), warn

    def started(self, config: Config, directory: Path, metrics: Path, rows: int) -> Loggers:
        """Starts them with the first ``rows`` rows of the file ``metrics``, for use in a ``with`` statement."""
        if self._working:
            kept = read_bytes(metrics).splitlines()[:rows] if rows else []
            self._each(lambda logger: logger.start(config, directory, [from_json(line) for line in kept]))
        return self

    def row(self, row: Row) -> None:
        self._each(lambda logger: logger.row(finite(row)))

    def result(self, result: dict[str, Any]) -> None:
        self._each(lambda logger: logger.result(finite(result)))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in tuple(self._working):
            try:
                call(logger)
            except Exception as error:
                self._working.remove(logger)
                reason = f"{type(error).__name__}: {error}"
                self.warn(
                    f"{type(logger).__name__} failed and is not called again ({reason}); the run goes on without it, "
                    "and metrics.jsonl has every row"
                )


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a row by name: ``eval/loss``, ``eval/hyperparameters/dropout`` etc., without those that are None.

    ``step`` is not among them: it is their place on the horizontal axis.
    """
    return dict(numbers({key: value for key, value in row.items() if key not in ("step", "phase")}, row["phase"]))


def numbers(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The finite numbers in nested mappings, each with its path, which begins with ``prefix``."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", value


def read_record(path: Path) -> dict[str, Any]:
    """What a logger noted in the run directory; empty if it has not.

    Raises:
        UserError: the file can't be read, or is not what it wrote.
    """
    if not path.exists():
        return {}
    try:
        record = from_json(read_bytes(path))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("run"), str):
        raise UserError(f"{path} does not name a run; restore it, or remove it to continue as a new one")
    return record
