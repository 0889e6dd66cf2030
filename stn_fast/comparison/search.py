"""Random search and TPE by Optuna, whose studies are kept in a journal.

Every trial of a study draws from a sampler of its own, seeded by the method, the study's seed and the trial's number,
so that a study that is stopped and continued has the trials of one that never stopped. A trial that was not finished is
told to Optuna as failed, and another one with the same draw takes its place. One that becomes non-finite is told as
complete, with an infinite loss, so that TPE learns to avoid its neighbourhood.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stn_fast.comparison.guesses import only_bound
from stn_fast.errors import UserError
from stn_fast.extras import extra
from stn_fast.files import exists, read_bytes
from stn_fast.training.config import Config, HyperparameterConfig
from stn_fast.values import from_json

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

SEARCHES = ("random", "tpe")
STARTUP = 4  # random trials before TPE's model; with Optuna's ten, it would be a random search for its first ten trials
MARGIN = 1e-4  # share of a range beside each of its two bounds, which are not allowed themselves
DECADES = 1  # on either side of the recipe's distance from a single bound, as from the guess low to high

Sample = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """What a search draws for one hyperparameter, from ``low`` to ``high``.

    Two bounds: the value, uniformly; for an integer, a whole number. A single ``bound``: the distance from it,
    log-uniformly, above it or (``above`` false) below.
    """

    entry: HyperparameterConfig
    low: float
    high: float
    bound: float | None = None
    above: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return self.bound is None and self.entry.integer

    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna's."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.bound is not None)

    def init(self, drawn: float) -> float:
        """The hyperparameter's start for what was drawn; an integer is rounded down from the middle of its step."""
        if self.bound is not None:
            return self.bound + drawn if self.above else self.bound - drawn
        if not self.is_whole:
            return drawn
        assert self.entry.low is not None
        assert self.entry.high is not None
        return (max(drawn, self.entry.low) + min(drawn + 1, self.entry.high)) / 2


def search_space(defaults: Config) -> dict[str, Range]:
    """The range of every enabled hyperparameter by name.

    With two bounds it is the whole range, but for a ten-thousandth beside each bound. With a single bound, distances
    reach from a tenth to ten times the recipe's own.

    Raises:
        UserError: a hyperparameter has no bound.
    """
    return {name: _range(name, entry) for name, entry in defaults.enabled.items()}


def _range(name: str, entry: HyperparameterConfig) -> Range:
    if entry.low is not None and entry.high is not None:
        if entry.integer:
            return Range(entry, math.floor(entry.low), math.ceil(entry.high) - 1)
        margin = MARGIN * (entry.high - entry.low)
        return Range(entry, entry.low + margin, entry.high - margin)
    bound = only_bound(name, entry, "a search needs")
    distance, factor = abs(entry.init - bound), 10.0**DECADES
    return Range(entry, distance / factor, distance * factor, bound, above=entry.low is not None)


def sampled(defaults: Config, space: Mapping[str, Range], sample: Sample) -> Config:
    """``defaults`` with hyperparameters that start from a study's ``sample``."""
    entries = dict(defaults.hyperparameters)
    changed = {name: replace(entries[name], init=space[name].init(drawn)) for name, drawn in sample.items()}
    return replace(defaults, hyperparameters=entries | changed)


def open_journal(path: Path) -> BaseStorage:
    """Optuna's storage in the file ``path``, which need not exist and which no other process may be using.

    A last line that is not complete, which a killed command left, is removed, and so is its lock.

    Raises:
        UserError: Optuna is missing, or the file is not one of its journals.
    """
    with extra("optuna"):
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    try:
        if exists(path):
            _repair(path)
        backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
        return optuna.storages.JournalStorage(backend)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is not a journal of Optuna ({error}); restore it, or choose another --out") from None


def _repair(path: Path) -> None:
    """Removes the incomplete last line of a journal.

    Raises:
        ValueError, TypeError, LookupError: another line is not one of a journal.
    """
    *lines, last = read_bytes(path).split(b"\n")
    for line in lines:
        if not isinstance(from_json(line)["op_code"], int):
            raise ValueError("an op_code is not a number")
    if last:
        path.write_bytes(b"".join(line + b"\n" for line in lines))


def sampler(method: str, seed: int, trial: int) -> BaseSampler:
    """The sampler of one trial of a study."""
    from optuna.samplers import RandomSampler, TPESampler

    own = int.from_bytes(hashlib.sha256(f"{method} {seed} {trial}".encode()).digest()[:4], "big")
    if method == "random":
        return RandomSampler(seed=own)
    return TPESampler(n_startup_trials=STARTUP, constant_liar=False, seed=own)


class Study:
    """One search: its trials in order, numbered from 0.

    Args:
        storage: of `open_journal`.
        name: tells studies apart, so it must contain everything that the trials depend on.
        method, seed: one of ``SEARCHES``, and the seed of its samplers.
        space: of `search_space`.
    """

    def __init__(self, storage: BaseStorage, name: str, method: str, seed: int, space: Mapping[str, Range]) -> None:
        import optuna

        self._states = optuna.trial.TrialState
        self._method, self._seed = method, seed
        self._distributions = {name: each.distribution() for name, each in space.items()}
        self._study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler(method, seed, 0), load_if_exists=True
        )
        for trial in self._study.get_trials(states=(self._states.RUNNING,)):
            self._study.tell(trial.number, state=self._states.FAIL)

    def sample(self, number: int) -> tuple[Sample, Any]:
        """What was drawn for a trial, and the trial that waits for its result; None if it has one.

        Trials must be finished in order.
        """
        finished = self._study.get_trials(states=(self._states.COMPLETE,))
        if number < len(finished):
            return finished[number].params, None
        self._study.sampler = sampler(self._method, self._seed, number)
        trial = self._study.ask(self._distributions)
        return trial.params, trial

    def tell(self, trial: Any, loss: float) -> None:
        """Finishes a trial with its best validation loss."""
        self._study.tell(trial, loss)
