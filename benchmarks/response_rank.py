"""How well a recipe tunes by its response's rank, its cycle and its validation batch, over several seeds.

    python -m benchmarks.response_rank digits --out benchmarks/results/response-rank.jsonl
    python -m benchmarks.response_rank ptb-small --variants full rank-16 factors-dropped --seeds 3 --out FILE

Each finished run appends a row to FILE, and runs with a row in FILE are skipped: the command can be stopped at any time
and continues where it stopped. Seeds are the outer loop, so that partial results compare the same seeds. At the end it
prints the mean and the range over seeds of each variant's losses and final hyperparameters.

full             a full response, as in the recipe
rank-K, auto     ``method.response_rank``
frozen           the control: a full response, but hyperparameters that are never updated
cycle-N          rank 16, N training steps per validation step
half-batch       rank 16, half the recipe's validation batch
factors-dropped  rank 16, with DropConnect on A and B of recurrent matrices as well as on W

All runs have the published start and steps, whatever the recipe has.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.kept_runs import add_kept_run_flags, mean_and_range
from benchmarks.self_tuning import writable
from stn_fast.command_line import run_command
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.runs import measure, score
from stn_fast.conversion.layers import DropConnectLSTM
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers import DropConnect
from stn_fast.ops.gates import GatedParameters
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config, as_published
from stn_fast.training.task import Task

RANK = 16
RANKS = (1, 4, 16, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"rank-{rank}": {"response_rank": rank} for rank in RANKS},
    "auto": {"response_rank": "auto"},
    "frozen": {"freeze": True},
    "cycle-5": {"response_rank": RANK, "train_steps": 5},
    "cycle-10": {"response_rank": RANK, "train_steps": 10},
    "half-batch": {"response_rank": RANK},
    "factors-dropped": {"response_rank": RANK},
}
DEFAULT = tuple(variant for variant in VARIANTS if variant != "factors-dropped")  # which needs an LSTM
KEPT = (
    "valid_loss", "test_loss", "test_accuracy", "test_perplexity", "hyperparameters", "best_step", "steps", "diverged",
)  # fmt: skip


class FactorsDropped(DropConnectLSTM):
    """DropConnect on W, A and B of the hidden-to-hidden matrices, by masks of their own."""

    of_factors: nn.ModuleDict  # the DropConnect of A and of B of each matrix

    def _connected(self, suffix: str, hyper: HyperBatch | Tensor) -> GatedParameters:
        weights, batch = super()._connected(suffix, hyper), self.hyper
        drop_a, drop_b = (self.of_factors[f"{factor}_{suffix}"] for factor in "ab")
        projection = weights.response_projection
        assert projection is not None
        if batch is None:
            return weights
        return weights._replace(
            response_weight=drop_a(weights.response_weight, batch), response_projection=drop_b(projection, batch)
        )


def build(config: Config) -> Task:
    """The recipe's task, with LSTMs that drop factors."""
    task = recipe(config.recipe).build(config)
    _drop_factors(task.model)
    return task


def _drop_factors(model: nn.Module) -> None:
    layers = [(one, one.name) for one in model.modules() if isinstance(one, DropConnectLSTM) and one.name is not None]
    if not layers:
        raise UserError("factors-dropped is for a recipe whose network has an LSTM with recurrent_dropout")
    for layer, rate in layers:
        layer.__class__ = FactorsDropped
        layer.of_factors = nn.ModuleDict()
        for suffix, stream in zip(layer._every_suffix, layer.streams, strict=True):
            for factor, more in (("a", 10_000), ("b", 20_000)):
                layer.of_factors[f"{factor}_{suffix}"] = DropConnect(rate, stream=stream + more)


def configure(name: str, variant: str, seed: int, run_dir: Path, flags: argparse.Namespace) -> Config:
    defaults = as_published(replace(recipe(name).config(), data_root=flags.data_root))
    schedule = replace(defaults.schedule, epochs=flags.epochs or defaults.schedule.epochs)
    if variant == "half-batch":
        schedule = replace(schedule, valid_batch_size=max(1, schedule.valid_batch_size // 2))
    method = replace(defaults.method, **VARIANTS[variant])
    return replace(
        defaults, method=method, schedule=schedule, seed=seed, run_dir=str(run_dir / f"{name}-{variant}-{seed}")
    )


KEY = ("recipe", "variant", "seed", "epochs")


def table(name: str, made: Iterable[Row]) -> str:
    """A line for each variant: mean (smallest to largest) over its seeds."""
    by_variant: dict[str, list[Row]] = {}
    for row in made:
        by_variant.setdefault(row["variant"], []).append(row)

    def cell(of_variant: Sequence[Row], column: str) -> str:
        return mean_and_range([score(row, column) for row in of_variant], ".4f")

    lines = [f"{name:>20}  {'best validation loss':<28} {'test loss there':<28} seeds"]
    for variant in sorted(by_variant, key=list(VARIANTS).index):
        of_variant = by_variant[variant]
        cells = "  ".join(f"{cell(of_variant, column):<27}" for column in ("valid_loss", "test_loss"))
        lines.append(f"{variant:>20}  {cells}  {len(of_variant)}")
        finite = [row for row in of_variant if not row["diverged"]]
        for parameter in finite[0]["hyperparameters"] if finite else ():
            lines.append(
                f"{'':>22}{parameter:<28}{mean_and_range([row['hyperparameters'][parameter] for row in finite])}"
            )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.response_rank", description=(__doc__ or "").splitlines()[0])
    it.add_argument("recipes", nargs="+", metavar="RECIPE", choices=list(RECIPES), help=", ".join(RECIPES))
    it.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT))
    add_kept_run_flags(it)
    it.add_argument("--run-dir", metavar="DIR", help="keep the runs here, a folder each (default: nowhere)")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are not in the file yet and prints the tables; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    if flags.seeds < 1:
        it.error(f"--seeds must be at least 1; got {flags.seeds}")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
            for seed in range(flags.seeds):
                for name in flags.recipes:
                    for variant in flags.variants:
                        row = {"recipe": name, "variant": variant, "seed": seed, "epochs": flags.epochs}
                        if kept.find(row) is not None:
                            continue
                        config = configure(name, variant, seed, Path(flags.run_dir or scratch), flags)
                        result = measure(config, build if variant == "factors-dropped" else None)
                        kept.add(row | {name: result[name] for name in KEPT if name in result})
            for name in flags.recipes:
                asked = [row for row in kept if row["recipe"] == name and row["epochs"] == flags.epochs]
                print(table(name, [row for row in asked if row["variant"] in flags.variants]) + "\n", flush=True)
    except UserError as error:
        it.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
