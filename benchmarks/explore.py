"""Compares what a self-tuned run's response predicts with networks trained at the hyperparameters in question.

    python -m benchmarks.explore digits --seeds 3 --out benchmarks/results/explore.jsonl

For each seed, trains a self-tuned run and finds the hyperparameter along which its response predicts the largest range
of validation losses within ±2σ (python -m stn_fast.explore draws them). Then trains plain networks from scratch, with
that hyperparameter fixed at λ − 2σ, λ and λ + 2σ and all others at the run's last values, and prints their validation
losses at the end beside the predictions. At each value, as many networks as --trained says have the seeds 0, 1, ...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import add_kept_run_flags, mean_and_range
from benchmarks.self_tuning import sharing, writable
from stn_fast.command_line import run_command
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.runs import configure, digest, evaluations, measured
from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config, HyperparameterConfig
from stn_fast.training.layering import resolve

METHODS = ("stn", "delta-stn")
KEY = ("recipe", "method", "seed", "settings", "at", "trained_seed")
PLACES = ("low", "here", "high")  # of a curve, by ascending shift


def predictions(config: Config) -> list[Row]:
    """Makes the self-tuned run; the hyperparameters at the three places, with the loss that the response predicts."""
    from stn_fast.exploration.response import explored
    from stn_fast.exploration.restoring import restored
    from stn_fast.training.progress import Progress
    from stn_fast.training.run import run, using_threads

    build = recipe(config.recipe).build
    run(config, build)
    with using_threads(config.threads):
        trainer = restored(Path(config.directory), config.resolved, build, Progress().warn)
        curve = explored(trainer, examples=trainer.task.data.valid.examples, pairs=False).curves[0]
    last = trainer.method.space.values(trainer.method.location)
    return [
        {
            "hyperparameter": curve.name,
            "scale": curve.scale,
            "at": point.shift,
            "value": point.value,
            "predicted": point.loss,
            "hyperparameters": last | {curve.name: point.value},
        }
        for point in (getattr(curve, place) for place in PLACES)
    ]


def fixed_at(values: dict[str, float], config: Config) -> Config:
    """``config`` with the enabled hyperparameters starting from these constrained values."""
    changed = {name: starting(entry, values[name]) for name, entry in config.enabled.items()}
    return replace(config, hyperparameters={**config.hyperparameters, **changed})


def starting(entry: HyperparameterConfig, value: float) -> HyperparameterConfig:
    """``entry`` with another first guess; that of an integer is the middle of the values that round down to it."""
    return replace(entry, init=value + 0.5 if entry.integer else value)


def table(rows: Sequence[Row]) -> str:
    """A line for each seed and place: the prediction beside mean (smallest to largest) of the trained networks."""
    lines = [f"{'seed':>4}  {'hyperparameter':<18} {'at':>4} {'value':>10} {'predicted':>10}  trained, at the end"]
    lines[0] += f"{'':>15}best of each"
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["seed"], row["at"]), []).append(row)
    for (seed, at), group in groups.items():
        first = group[0]
        trained = [
            mean_and_range([row[key] for row in group], ".4f") if all(row[key] is not None for row in group) else "-"
            for key in ("end_loss", "best_loss")
        ]
        start = f"{seed:>4}  {first['hyperparameter']:<18} {f'{at:+.0f}σ' if at else 'λ':>4}"
        lines.append(f"{start} {first['value']:>10.3g} {first['predicted']:>10.4f}  {trained[0]:<33} {trained[1]}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    it = argparse.ArgumentParser(prog="python -m benchmarks.explore", description=about)
    it.add_argument("recipe", choices=list(RECIPES))
    it.add_argument("--method", choices=METHODS, default="stn")
    it.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key of the recipe")
    it.add_argument("--trained", type=int, default=3, metavar="N", help="networks at each value (default: %(default)s)")
    it.add_argument("--jobs", type=int, default=1, help="parallel runs (default: %(default)s)")
    add_kept_run_flags(it)
    it.set_defaults(seeds=3)
    return it


def compute(flags: argparse.Namespace) -> list[Row]:
    """Makes the rows that are not in --out yet and returns all that are asked for.

    Raises:
        UserError: a flag's value is wrong.
    """
    if min(flags.seeds, flags.trained, flags.jobs) < 1:
        got = f"{flags.seeds}, {flags.trained} and {flags.jobs}"
        raise UserError(f"--seeds, --trained and --jobs must be at least 1, got {got}")
    kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
    defaults = replace(recipe(flags.recipe).config(), data_root=flags.data_root)
    base = sharing(resolve(defaults, pairs=flags.set), flags.jobs)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(flags.seeds):
            config = configure(base, flags.method, seed, 1.0, Path(scratch) / f"tuned-{seed}", flags.epochs)
            about = {"recipe": flags.recipe, "method": flags.method, "seed": seed, "settings": digest(config)}
            found = [row for row in kept if all(row[key] == value for key, value in about.items())]
            found = [row for row in found if row["trained_seed"] < flags.trained]
            if len(found) < len(PLACES) * flags.trained:
                found = made(config, base, about, flags.trained, flags.jobs)
                for row in found:
                    kept.add(row)
            rows += found
    return rows


def made(config: Config, base: Config, about: Row, trained: int, jobs: int) -> list[Row]:
    """The rows of one self-tuned run, one for each of the ``trained`` networks at each place."""
    asked = [{**about, **place, "trained_seed": seed} for place in predictions(config) for seed in range(trained)]
    folder, epochs = Path(config.directory).parent, config.schedule.epochs
    configs = [
        configure(
            fixed_at(row["hyperparameters"], base),
            "fixed",
            row["trained_seed"],
            1.0,
            folder / f"fixed-{row['seed']}-{number}",
            epochs,
        )
        for number, row in enumerate(asked)
    ]
    with measured(configs, jobs) as coming:
        results = []
        for number, result in enumerate(coming, 1):
            results.append(result)
            print(f"seed {about['seed']}: {number} of {len(asked)} networks trained", flush=True)
    ends = [evaluations(Path(one.directory) / "metrics.jsonl") for one in configs]
    return [
        {
            **row,
            "end_loss": None if result["diverged"] else end[-1]["loss"],
            "best_loss": None if result["diverged"] else result["valid_loss"],
        }
        for row, result, end in zip(asked, results, ends, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs and prints the table; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    try:
        rows = compute(flags)
    except UserError as error:
        it.error(str(error))
    print(f"{flags.recipe}, {flags.method}\n{table(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
