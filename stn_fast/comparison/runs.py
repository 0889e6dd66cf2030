"""One run of a comparison: its configuration and its result."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stn_fast.comparison.kept_runs import Row
from stn_fast.comparison.processes import mapped
from stn_fast.comparison.sources import sources_digest
from stn_fast.files import exists, read_text
from stn_fast.recipes import recipe
from stn_fast.training.config import Config, HyperOptimizerConfig, HyperparameterConfig, MethodConfig
from stn_fast.values import from_json, to_json

if TYPE_CHECKING:
    from stn_fast.training.task import Task

METHODS: dict[str, dict[str, Any]] = {
    "stn": {"name": "stn", "freeze": False},
    "delta-stn": {"name": "delta-stn", "freeze": False},
    "one-pass": {"name": "one-pass", "freeze": False, "train_steps": 10},
    "fixed": {"name": "fixed", "freeze": False},
    "frozen": {"name": "stn", "freeze": True},
}
SELF_TUNED = ("stn", "delta-stn")  # the methods that searches and others are compared with
ONE_PASS_ADAM = HyperOptimizerConfig(learning_rate=0.05, beta2=0.999)  # 0.115, about the published rate, is worse
# Columns of a curve; every other one is in the evaluations of metrics.jsonl by the same name.
CURVE = ("cpu_seconds", "step_cpu_seconds", "train_examples", "valid_examples", "valid_loss", "test_loss")


def configure(defaults: Config, method: str, seed: int, factor: float, run_dir: Path, epochs: int | None) -> Config:
    """``defaults`` with ``method`` and ``seed``, and both learning rates multiplied by ``factor``.

    one-pass has a cycle, an optimizer of its hyperparameters and a constant learning rate of the weights of its own,
    whatever ``defaults`` say: it tunes the learning rate, so nothing else may change it. Settings of tuning, which do
    nothing with fixed hyperparameters, have their defaults there, so that fixed runs stay the same runs when they
    change.
    """
    changed: MethodConfig = replace(defaults.method, **METHODS[method])
    weights, hyper, tuned = defaults.optimizer, defaults.hyper_optimizer, defaults.hyperparameters
    if method == "fixed":
        changed = MethodConfig(name="fixed", response_rank=changed.response_rank)
        hyper = HyperOptimizerConfig()
        tuned = {name: replace(one, scale=HyperparameterConfig.scale) for name, one in tuned.items()}
    if method == "one-pass":
        weights = replace(weights, decay_factor=1.0, min_learning_rate=0.0)
        hyper = ONE_PASS_ADAM
    schedule = replace(defaults.schedule, epochs=epochs or defaults.schedule.epochs)
    return replace(
        defaults,
        hyperparameters=tuned,
        method=changed,
        seed=seed,
        optimizer=replace(weights, learning_rate=weights.learning_rate * factor),
        hyper_optimizer=replace(hyper, learning_rate=hyper.learning_rate * factor),
        schedule=schedule,
        run_dir=str(run_dir),
    )


def digest(config: Config) -> str:
    """A hash of everything in ``config`` that a run's numbers depend on."""
    return digest_of(numbers_of(replace(config, threads=None)))


def numbers_of(config: Config) -> dict[str, Any]:
    """The entries of ``config`` without those that change no number.

    A setting that has come later is also left out at its default, so that the rows of older versions stay valid.
    """
    own = asdict(replace(config, run_dir=None, data_root=None))
    del own["loggers"], own["schedule"]["checkpoints_kept"]
    if config.schedule.accumulation == 1:
        del own["schedule"]["accumulation"]
    return own


def digest_of(value: Any) -> str:
    """A hash of a value that JSON can hold, in twelve hexadecimal digits."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:12]


def measure(
    config: Config, build: Callable[[Config], Task] | None = None, *, resume: bool = False, **options: Any
) -> Row:
    """One run's result, with the count of hyperparameters that moved by more than their initial σ as ``moved``.

    If it became non-finite, ``diverged`` says where, and the result has only the seed and the compute until then.
    ``build`` makes the task; by default the recipe does. ``options`` are those of ``run``.
    """
    from stn_fast.training.run import run
    from stn_fast.training.trainer import Diverged

    try:
        result = run(config, build or recipe(config.recipe).build, resume=resume, **options)
    except Diverged as error:
        return {"seed": config.seed, "diverged": str(error), **error.compute}
    moved = sum(abs(distance) > 1 for distance in result["moved_in_initial_scales"].values())
    return {**result, "moved": moved, "diverged": None}


def measure_with_curve(place: str, config: Config) -> Row:
    """``measure`` of the recipe named ``place``, with ``curve``, a list for each of ``CURVE``, and the ``loss_unit``.

    A run that was stopped continues from its checkpoint. ``sources`` is the digest of the package's.
    """
    result = measure(config, recipe(place).build, resume=True)
    rows = evaluations(Path(config.directory) / "metrics.jsonl")
    curve = {name: [row["loss" if name == "valid_loss" else name] for row in rows] for name in CURVE}
    own = {"loss_unit": rows[0]["loss_unit"] if rows else "", "sources": sources_digest()}
    return {**result, "curve": curve, **own}


def evaluations(metrics: Path) -> list[Row]:
    """The rows of a run's evaluations; none if it ended before the first one."""
    rows = [from_json(line) for line in read_text(metrics).splitlines()] if exists(metrics) else []
    return [row for row in rows if row["phase"] == "eval"]


def measured(configs: Sequence[Config], jobs: int) -> AbstractContextManager[Iterator[Row]]:
    """Yields the results of ``configs`` in order; several ``jobs`` at a time are processes of their own."""
    return mapped(measure, configs, jobs)


def score(result: Row, key: str) -> float:
    """``key`` of a run; infinite if it is too large for a float, or the run became non-finite."""
    return math.inf if result["diverged"] or result[key] is None else result[key]
