"""Compares a recipe's self-tuned runs in bf16 and fp32, with the same seeds, on the CPU.

    python -m benchmarks.precision digits fashion-mnist-small ptb-small --seeds 3 --jobs 2

Prints one row for every run, medians, and for each recipe whether bf16 is as good as fp32: its mean best validation
loss must not exceed that of fp32 by more than the range (largest minus smallest) of fp32 over at least two seeds. If
so, the recipe's ``precision`` is ``auto``, which is bf16 on CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.self_tuning import add_run_flags, check_run_flags, sharing, table
from stn_fast.command_line import run_command
from stn_fast.comparison.kept_runs import Row
from stn_fast.comparison.runs import configure, measured, score
from stn_fast.errors import UserError
from stn_fast.files import expanded
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Precision
from stn_fast.values import to_json

COMPARED: tuple[Precision, Precision] = ("fp32", "bf16")


def losses(runs: Sequence[Row], precision: Precision) -> list[float]:
    """Best validation losses of the runs in ``precision``; infinite for a run that became non-finite."""
    return [score(run, "valid_loss") for run in runs if run["precision"] == precision]


def spread(values: Sequence[float]) -> float:
    """The largest value minus the smallest."""
    return max(values) - min(values)


def holds(runs: Sequence[Row]) -> bool:
    """Whether bf16 is as good as fp32 in these runs of a recipe; see the top of this file."""
    fp32, bf16 = (losses(runs, precision) for precision in COMPARED)
    enough = min(len(fp32), len(bf16)) >= 2
    return enough and statistics.mean(bf16) - statistics.mean(fp32) <= spread(fp32)


def verdict(runs: Sequence[Row]) -> str:
    """One line on the runs of a recipe."""
    fp32, bf16 = (losses(runs, precision) for precision in COMPARED)
    held = "holds the quality" if holds(runs) else "is not shown to hold the quality"
    return (
        f"mean best validation loss over {len(fp32)} seeds: bf16 {statistics.mean(bf16):.4g}, "
        f"fp32 {statistics.mean(fp32):.4g} with a range of {spread(fp32):.4g}: bf16 {held}"
    )


def compare(name: str, flags: argparse.Namespace) -> list[Row]:
    """Makes the runs of the recipe ``name``, seed by seed, and prints them."""
    defaults = sharing(replace(recipe(name).config(), data_root=flags.data_root), flags.jobs)
    cases = list(itertools.product(range(flags.seeds), COMPARED))
    with tempfile.TemporaryDirectory() as scratch:
        configs = [
            configure(
                replace(defaults, precision=precision),
                "stn",
                seed,
                1.0,
                Path(flags.run_dir or scratch) / f"{name}-{precision}-seed{seed}",
                flags.epochs,
            )
            for seed, precision in cases
        ]
        with measured(configs, flags.jobs) as coming:
            runs = [{**run, "precision": precision} for run, (_, precision) in zip(coming, cases, strict=True)]
    print(name)
    for precision in COMPARED:
        print(table(precision, [run for run in runs if run["precision"] == precision]))
    print(verdict(runs) + "\n", flush=True)
    return runs


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.splitlines()[0])
    it.add_argument("recipes", nargs="+", metavar="RECIPE", choices=list(RECIPES), help=", ".join(RECIPES))
    add_run_flags(it, seeds=3)
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and prints; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    check_run_flags(it, flags)
    try:
        results = {name: compare(name, flags) for name in flags.recipes}
    except UserError as error:
        it.error(str(error))
    if flags.json:
        expanded(flags.json, "--json").write_text(to_json(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
