"""Whether self-tuning pays: the same network from the same bad guess, tuned, fixed and frozen, over several seeds.

    python -m benchmarks.self_tuning digits --seeds 5
    python -m benchmarks.self_tuning digits --seeds 20 --methods stn --learning-rate-factor 2

Prints one row for every run, medians, the ratio of best validation losses, and how many runs turned non-finite.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def measure(config: Config, build: Any) -> dict[str, Any]:
    """One run's result, with the count of hyperparameters that moved by more than their initial σ as ``moved``."""
    from stn_fast.training.run import run
    from stn_fast.training.trainer import Diverged

    try:
        result = run(config, build, resume=False)
    except Diverged as error:
        return {"seed": config.seed, "diverged": str(error)}
    moved = sum(abs(distance) > 1 for distance in result["moved_in_initial_scales"].values())
    return {**result, "moved": moved, "diverged": None}


def table(method: str, results: Sequence[dict[str, Any]]) -> str:
    """One line for every run and one for the median."""
    finite = [result for result in results if not result["diverged"]]
    lines = [f"{method:>8}  " + "  ".join(f"{title:>13}" for title in COLUMNS.values())]
    lines += [
        f"  seed {result['seed']:>2}  "
        + ("not finite" if result["diverged"] else "  ".join(f"{result[key]:13.4g}" for key in COLUMNS))
        for result in results
    ]
    if finite:
        medians = (statistics.median(result[key] for result in finite) for key in COLUMNS)
        lines.append(f"{'median':>8}  " + "  ".join(f"{median:13.4g}" for median in medians))
    return "\n".join(lines)


def median_loss(results: Sequence[dict[str, Any]]) -> float:
    """Median over runs of the best validation loss; infinite for a run that turned non-finite."""
    return statistics.median(float("inf") if r["diverged"] else r["valid_loss"] for r in results)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.self_tuning", description=__doc__.splitlines()[0])
    it.add_argument("recipe", nargs="?", default="digits", choices=list(RECIPES))
    it.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: 5)")
    it.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    it.add_argument("--learning-rate-factor", type=float, default=1.0, help="multiplies both learning rates")
    it.add_argument("--epochs", type=int, help="instead of the recipe's own")
    it.add_argument("--run-dir", metavar="DIR", help="keep the runs here, METHOD-seedN; default: a temporary directory")
    it.add_argument("--json", metavar="FILE", help="write every result here")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and prints; returns 0."""
    flags = parser().parse_args(arguments)
    module = recipe(flags.recipe)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(flags.run_dir or scratch)
        for method in flags.methods:
            results[method] = []
            for seed in range(flags.seeds):
                target = root / f"{method}-seed{seed}"
                config = configure(module.config(), method, seed, flags.learning_rate_factor, target, flags.epochs)
                results[method].append(measure(config, module.build))
            print(table(method, results[method]), flush=True)
            lost = sum(result["diverged"] is not None for result in results[method])
            print(f"          {lost} of {flags.seeds} runs turned non-finite\n", flush=True)
    for other in ("fixed", "frozen"):
        if "stn" in results and other in results:
            ratio = median_loss(results["stn"]) / median_loss(results[other])
            print(f"best validation loss, median of stn / median of {other}: {ratio:.3f}")
    if flags.json:
        Path(flags.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
