"""The runs and searches that a comparison needs; those that are kept in its folder are not made again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stn_fast.comparison.guesses import Guess, guessed, labels
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.processes import Processes, Task
from stn_fast.comparison.runs import CURVE, configure, digest_of, measure_with_curve, numbers_of, score
from stn_fast.comparison.search import SEARCHES, Range, Study, open_journal, sampled, search_space
from stn_fast.recipes import RecipeLike
from stn_fast.training.config import Config

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

KEY = ("recipe", "method", "guess", "seed", "trial", "settings")


@dataclass(frozen=True)
class Comparison:
    """What is compared: methods from guesses, and searches of ``budget`` trials, each with seeds 0 to ``seeds`` - 1.

    ``place`` is the recipe's name on the command line, ``defaults`` are its settings, ``out`` is the folder of all
    files, and ``circumstances`` are those of the function below.
    """

    place: str
    defaults: Config
    methods: tuple[str, ...]
    guesses: tuple[Guess, ...]
    budget: int
    seeds: int
    out: Path
    circumstances: Mapping[str, Any]

    @property
    def searches(self) -> list[str]:
        """The methods that are searches."""
        return [method for method in self.methods if method in SEARCHES]

    @property
    def from_guesses(self) -> list[str]:
        """The methods that start from guesses."""
        return [method for method in self.methods if method not in SEARCHES]

    def place_in_tables(self, row: Row) -> tuple[int, int, int, int]:
        """Sorts rows by method, guess, seed and trial, which does not depend on the order in which runs end."""
        guess = -1 if row["guess"] is None else labels(self.guesses).index(row["guess"])
        return self.methods.index(row["method"]), guess, row["seed"], row["trial"] or 0

    def settings(self, config: Config, **others: Any) -> str:
        """A digest of all that a row depends on: ``config``, data, versions, columns of curves, and ``others``."""
        own = numbers_of(config)
        del own["fit"]  # of runs of stn_fast.fit, which are not compared
        return digest_of({"config": own, "circumstances": self.circumstances, "columns": CURVE, **others})


def circumstances(defaults: Config, module: RecipeLike) -> dict[str, Any]:
    """What results depend on beside their settings: checksums of the data, versions, the device and the backend.

    The code of a recipe of your own is not covered.

    Raises:
        UserError: the settings or the data cannot be used.
    """
    from stn_fast.data import fingerprint
    from stn_fast.training.run import checked_task, versions

    task = checked_task(defaults, module.build)
    found = versions(defaults.device)
    kept = ("stn_fast", "torch", "platform", "device", "backend")
    return {"data": fingerprint(task.data, task.vocabulary), "versions": {name: found[name] for name in kept}}


def make_runs(comparison: Comparison, jobs: int, say: Callable[[str], None]) -> list[Row]:
    """Makes all runs that are not kept, ``jobs`` at a time, and returns the row of every one that is asked for.

    Searches, which take longest, begin first. ``say`` is called after every run.

    Raises:
        UserError: a file in the folder is damaged, or a run cannot be made.
        Stopped: by a signal; the same call continues.
    """
    kept = KeptRuns(comparison.out / "runs.jsonl", KEY)
    maker = _Maker(comparison, kept, say)
    storage = open_journal(comparison.out / "searches.journal") if comparison.searches else None
    seeds = range(comparison.seeds)
    tasks: list[Task] = []
    if storage is not None:
        tasks += [maker.search(storage, method, seed) for seed, method in itertools.product(seeds, comparison.searches)]
    runs = itertools.product(seeds, comparison.guesses, comparison.from_guesses)
    tasks += [maker.run(method, guess, seed) for seed, guess, method in runs]
    with Processes(jobs) as processes:
        processes.run(tasks)
    if maker.scratch.is_dir() and not list(maker.scratch.iterdir()):
        maker.scratch.rmdir()
    return sorted(maker.rows, key=comparison.place_in_tables)


class _Maker:
    """Tasks for `Processes`, each of which adds rows to ``rows`` and, if it had to make them, to the kept ones."""

    def __init__(self, comparison: Comparison, kept: KeptRuns, say: Callable[[str], None]) -> None:
        self.comparison, self.kept, self.say = comparison, kept, say
        self.scratch = comparison.out / "unfinished"
        self.rows: list[Row] = []
        self.total = comparison.seeds * (
            len(comparison.guesses) * len(comparison.from_guesses) + comparison.budget * len(comparison.searches)
        )

    def run(self, method: str, guess: Guess, seed: int) -> Task:
        """One run of a method from a guess."""
        (label,) = labels([guess])
        defaults = guessed(self.comparison.defaults, guess)
        config = configure(defaults, method, seed, 1.0, self.scratch, None)
        run = self._key(method, label, seed, None, self.comparison.settings(config))
        yield from self._row(run, config, {})

    def search(self, storage: BaseStorage, method: str, seed: int) -> Task:
        """All trials of a search."""
        import optuna

        defaults = self.comparison.defaults
        base, space = configure(defaults, "fixed", seed, 1.0, self.scratch, None), search_space(defaults)
        own = {"method": method, "optuna": optuna.__version__, "space": _described(space)}
        settings = self.comparison.settings(base, **own)
        study = Study(storage, f"{defaults.recipe}-{method}-seed{seed}-{settings}", method, seed, space)
        for number in range(self.comparison.budget):
            sample, trial = study.sample(number)
            run = self._key(method, None, seed, number, settings)
            row = yield from self._row(run, sampled(base, space, sample), {"sample": sample})
            if trial is not None:
                study.tell(trial, score(row, "valid_loss"))

    def _key(self, method: str, guess: str | None, seed: int, trial: int | None, settings: str) -> Row:
        values = (self.comparison.defaults.recipe, method, guess, seed, trial, settings)
        return dict(zip(KEY, values, strict=True))

    def _row(self, run: Row, config: Config, more: Row) -> Any:
        """The row of a run: the kept one, or one that is made, in which case the call is yielded."""
        name = "-".join(str(run[part]) for part in ("method", "guess", "trial", "seed", "settings"))
        folder = self.scratch / f"{name}-{digest_of(more)}"
        row = self.kept.find(run)
        if row is None or any(row.get(name) != value for name, value in more.items()):
            result = yield measure_with_curve, (self.comparison.place, replace(config, run_dir=str(folder)))
            row = {**result, **run, **more, "used": _used(config)}
            self.kept.add(row)
            self.say(f"{len(self.rows) + 1} of {self.total} runs: {_told(row)}")
        shutil.rmtree(folder, ignore_errors=True)
        self.rows.append(row)
        return row


def _used(config: Config) -> dict[str, Any]:
    """The sections of a run's settings that may differ from the recipe's because of the method."""
    sections = ("method", "optimizer", "hyper_optimizer")
    return {name: asdict(getattr(config, name)) for name in sections}


def _described(space: Mapping[str, Range]) -> dict[str, Any]:
    return {name: asdict(each) for name, each in space.items()}


def _told(row: Row) -> str:
    """One line about a finished run."""
    where = f"from {row['guess']}" if row["trial"] is None else f"trial {row['trial'] + 1}"
    if row["diverged"]:
        scores = "became non-finite"
    else:
        scores = f"validation loss {score(row, 'valid_loss'):.4g}, test loss {score(row, 'test_loss'):.4g}"
    return f"{row['method']} {where}, seed {row['seed']}: {scores}, {row['cpu_seconds']:.1f} s of CPU time"


def groups(rows: list[Row]) -> Iterator[tuple[tuple[str, str | None, int], list[Row]]]:
    """((method, guess, seed), rows) of every run and every search; the trials of a search are in order."""
    found: dict[tuple[str, str | None, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["guess"], row["seed"]), []).append(row)
    for key, each in found.items():
        yield key, sorted(each, key=lambda row: row["trial"] or 0)
