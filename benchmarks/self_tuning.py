"""Whether self-tuning pays: the same network from the same bad guess, tuned, fixed and frozen, over several seeds.

    python -m benchmarks.self_tuning digits --seeds 5
    python -m benchmarks.self_tuning digits --seeds 20 --methods stn --learning-rate-factor 2
    python -m benchmarks.self_tuning fashion-mnist-small --seeds 3 --methods stn fixed --guesses .05 .5

Prints one row for every run, medians, the ratios of validation and test losses, and how many runs turned non-finite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config, MethodConfig

METHODS: dict[str, dict[str, Any]] = {"stn": {}, "fixed": {"name": "fixed"}, "frozen": {"freeze": True}}
COLUMNS = {
    "valid_loss": "valid loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "moved": "moved > σ",
    "wall_seconds": "seconds",
}
LOSSES = {"valid_loss": "best validation loss", "test_loss": "test loss there"}

Result = dict[str, Any]


def guessed(defaults: Config, guess: float | None) -> Config:
    """``defaults`` with every dropout rate starting from ``guess``; None leaves the recipe's own.

    Raises:
        UserError: the recipe has no dropout, or ``guess`` is no rate that its bounds allow.
    """
    if guess is None:
        return defaults
    entries = dict(defaults.hyperparameters)
    rates = [name for name in entries if "dropout" in name]
    if not rates:
        raise UserError(f"--guesses sets dropout rates, and {defaults.recipe} has none")
    return replace(defaults, hyperparameters=entries | {name: replace(entries[name], init=guess) for name in rates})


def configure(defaults: Config, method: str, seed: int, factor: float, run_dir: Path, epochs: int | None) -> Config:
    """``defaults`` under ``method`` and ``seed``, with both learning rates times ``factor``."""
    changed: MethodConfig = replace(defaults.method, **METHODS[method])
    weights, hyper = defaults.optimizer, defaults.hyper_optimizer
    schedule = replace(defaults.schedule, epochs=epochs or defaults.schedule.epochs)
    return replace(
        defaults,
        method=changed,
        seed=seed,
        optimizer=replace(weights, learning_rate=weights.learning_rate * factor),
        hyper_optimizer=replace(hyper, learning_rate=hyper.learning_rate * factor),
        schedule=schedule,
        run_dir=str(run_dir),
    )


def measure(config: Config) -> Result:
    """One run's result, with the count of hyperparameters that moved by more than their initial σ as ``moved``."""
    from stn_fast.training.run import run
    from stn_fast.training.trainer import Diverged

    try:
        result = run(config, recipe(config.recipe).build, resume=False)
    except Diverged as error:
        return {"seed": config.seed, "diverged": str(error)}
    moved = sum(abs(distance) > 1 for distance in result["moved_in_initial_scales"].values())
    return {**result, "moved": moved, "diverged": None}


@contextmanager
def measured(configs: Sequence[Config], jobs: int) -> Iterator[Iterator[Result]]:
    """The results of ``configs`` in order, as they come; ``jobs`` runs at a time, each in a process of its own."""
    if jobs == 1:
        yield map(measure, configs)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        yield pool.imap(measure, configs)


def table(title: str, results: Sequence[Result]) -> str:
    """One line for every run and one for the median."""
    finite = [result for result in results if not result["diverged"]]
    lines = [f"{title:>15}  " + "  ".join(f"{column:>13}" for column in COLUMNS.values())]
    lines += [
        f"{'seed':>12} {result['seed']:>2}  "
        + ("not finite" if result["diverged"] else "  ".join(f"{result[key]:13.4g}" for key in COLUMNS))
        for result in results
    ]
    if finite:
        medians = (statistics.median(result[key] for result in finite) for key in COLUMNS)
        lines.append(f"{'median':>15}  " + "  ".join(f"{median:13.4g}" for median in medians))
    lines.append(f"{'':>15}  {len(results) - len(finite)} of {len(results)} runs turned non-finite")
    return "\n".join(lines)


def median_loss(results: Sequence[Result], key: str) -> float:
    """Median over runs of ``key`` at the best validation loss; infinite for a run that turned non-finite."""
    return statistics.median(float("inf") if r["diverged"] else r[key] for r in results)


def ratios(results: dict[str, list[Result]], guess: float | None) -> list[str]:
    """One line for every loss and every method that stn is compared with."""
    start = "" if guess is None else f"from dropout {guess:g}: "
    return [
        f"{start}{what}, median of stn / median of {other}: "
        f"{median_loss(results['stn'], key) / median_loss(results[other], key):.3f}"
        for other in ("fixed", "frozen")
        if "stn" in results and other in results
        for key, what in LOSSES.items()
    ]


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.self_tuning", description=__doc__.splitlines()[0])
    it.add_argument("recipe", nargs="?", default="digits", choices=list(RECIPES))
    it.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: 5)")
    it.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    it.add_argument(
        "--guesses", nargs="+", type=float, metavar="RATE", help="what every dropout rate starts from (default: recipe)"
    )
    it.add_argument("--learning-rate-factor", type=float, default=1.0, help="multiplies both learning rates")
    it.add_argument("--epochs", type=int, help="instead of the recipe's own")
    it.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the CPU's threads (default: 1)")
    it.add_argument("--data-root", metavar="DIR", default=os.environ.get("STN_FAST_DATA"), help="data sets")
    it.add_argument("--run-dir", metavar="DIR", help="keep the runs here, METHOD-seedN; default: a temporary directory")
    it.add_argument("--json", metavar="FILE", help="write every result here")
    return it


def compare(flags: argparse.Namespace, defaults: Config) -> dict[str, list[Result]]:
    """Makes the runs, guess by guess and method by method, and prints them as they come; the results by method."""
    guesses: list[float | None] = flags.guesses or [None]
    results: dict[str, list[Result]] = {method: [] for method in flags.methods}
    compared: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        configs = []
        for guess, method, seed in itertools.product(guesses, flags.methods, range(flags.seeds)):
            name = f"{method}-seed{seed}" + ("" if guess is None else f"-from{guess:g}")
            target = Path(flags.run_dir or scratch) / name
            base = guessed(defaults, guess)
            configs.append(configure(base, method, seed, flags.learning_rate_factor, target, flags.epochs))
        with measured(configs, flags.jobs) as coming:
            for guess in guesses:
                here: dict[str, list[Result]] = {}
                for method in flags.methods:
                    here[method] = [{**result, "guess": guess} for result in itertools.islice(coming, flags.seeds)]
                    print(
                        table(method if guess is None else f"{method} from {guess:g}", here[method]) + "\n", flush=True
                    )
                    results[method] += here[method]
                compared += ratios(here, guess)
    print("\n".join(compared))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and prints; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    if flags.jobs < 1 or flags.seeds < 1:
        it.error(f"--jobs and --seeds must be at least 1; got {flags.jobs} and {flags.seeds}")
    defaults = replace(recipe(flags.recipe).config(), data_root=flags.data_root)
    if flags.jobs > 1:
        share = max(1, (os.cpu_count() or 1) // flags.jobs)
        defaults = replace(defaults, threads=min(share, defaults.threads or share))
    try:
        results = compare(flags, defaults)
    except UserError as error:
        it.error(str(error))
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
