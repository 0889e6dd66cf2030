"""Does a self-tuned network train better if hypergradients also move its learning rate?

    python -m benchmarks.learning_rate digits --seeds 5
    python -m benchmarks.learning_rate fashion-mnist-small --seeds 3 --factors 0.3 1

Compares `SelfTuning` with `TunedRate`, which adds the rule of `OnePass` for the learning rate, from several first
learning rates: factors of the recipe's. Prints for each the best validation loss, the test loss there, the learning
rate at the end and the time, mean (smallest to largest) over seeds. With --out, finished runs are kept.

On digits, it saves runs whose first learning rate is ten times too low, and makes others worse, in 1.6 times the time
(benchmarks/results/learning-rate.jsonl). So the package has no such method.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kept_runs import add_kept_run_flags, mean_and_range
from benchmarks.self_tuning import writable
from stn_fast.command_line import run_command
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.runs import measure, score
from stn_fast.errors import UserError
from stn_fast.modes import evaluating
from stn_fast.recipes import recipe
from stn_fast.training.batches import Batch
from stn_fast.training.build import build_method
from stn_fast.training.config import Config
from stn_fast.training.finite import gradient_norms
from stn_fast.training.methods import Method, SelfTuning
from stn_fast.training.one_pass import UPDATES, Tuned, clipping, neumann_series
from stn_fast.training.task import Task

RECIPES = ("digits", "fashion-mnist-small")  # trained by SGD, and without a state between batches
METHODS = ("stn", "stn+lr")
KEPT = ("valid_loss", "test_loss", "test_accuracy", "hyperparameters", "wall_seconds", "diverged")
KEY = ("recipe", "method", "step", "factor", "seed", "epochs")


class TunedRate(SelfTuning):
    """`SelfTuning` with SGD, whose learning rate follows the hypergradient of the validation loss.

    As `OnePass`: −Σ_j ∇Fᵀ (1 − ∂u/∂w)ʲ ∂u/∂(log rate), with u the next update of the weights and response, at the
    perturbed hyperparameters of its batch. The gated layers can't be differentiated twice, so products with the Hessian
    are central differences of gradients.
    """

    terms, every = 5, 5  # terms of the series; validation steps for each step of the learning rate
    towards: list[Tensor] | None = None
    validations = 0

    def follow(self, step: float) -> None:
        """Starts to tune the logarithm of the learning rate, by Adam with the learning rate ``step``."""
        self.log_rate = torch.tensor(math.log(self.learning_rate), requires_grad=True)
        self.rate_optimizer = torch.optim.Adam([self.log_rate], step)
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        loss = super().valid_step(batch, step, first_example=first_example)
        self.validations += 1
        if self.validations % self.every == 0:
            batch = self.begin("valid_step", batch)
            with evaluating(self.model):
                hyper = self.unperturbed(batch.examples)
                at = self._loss("validation", self.validation_objective, self.model, batch, hyper)
                self.towards = list(torch.autograd.grad(at, self.weights, materialize_grads=True))
        return loss

    def _train(self, batch: Batch, step: int | Tensor, first_example: int) -> Tensor:
        if self.towards is not None:
            self._move_rate(self.towards, batch, self._draw(batch, step, first_example))
            self.towards = None
        return super()._train(batch, step, first_example)

    def _move_rate(self, towards: list[Tensor], batch: Batch, draw: dict[str, Any]) -> None:
        (hyper,), rate = self._training_hypers(draw), self.learning_rate

        def gradients() -> list[Tensor]:
            loss = self._loss("training", self.training_objective, self.model, batch, hyper)
            return list(torch.autograd.grad(loss, self.weights, materialize_grads=True))

        here = [weight.detach().clone() for weight in self.weights]

        @torch.no_grad()
        def shift(along: list[Tensor], by: float) -> None:
            for weight, before, part in zip(self.weights, here, along, strict=True):
                weight.copy_(before + by * part)

        def curvature(along: list[Tensor]) -> list[Tensor]:
            """The Hessian times ``along``."""
            sizes = [float(torch.linalg.vector_norm(gradient_norms(of))) for of in (here, along)]
            small = 1e-3 * sizes[0] / max(sizes[1], 1e-30)
            shift(along, small)
            above = gradients()
            shift(along, -small)
            below = gradients()
            shift(along, 0.0)
            return [(a - b) / (2 * small) for a, b in zip(above, below, strict=True)]

        now = gradients()
        clipped = clipping(now, self.clip)
        (group,), states = self.optimizer.param_groups, self.optimizer.state
        tuned = Tuned(torch.tensor(rate), group["momentum"], 0.0)
        update = UPDATES[torch.optim.SGD]
        updates = [
            update(weight.detach(), clipped * gradient, states.get(weight, {}), group, tuned)
            for weight, gradient in zip(self.weights, now, strict=True)
        ]
        series = neumann_series(towards, lambda term: [rate * clipped * part for part in curvature(term)], self.terms)
        slope = -sum(float((a * b).sum()) for a, b in zip(series, updates, strict=True))
        self.log_rate.grad = torch.full_like(self.log_rate, slope)
        self.rate_optimizer.step()
        self.learning_rate = float(self.log_rate.detach().exp())


def make_method(config: Config, task: Task, *, method: str, step: float, made: list[Method]) -> Method:
    """The method of one run, which is also put into ``made``."""
    built = build_method(config, task)
    if method == "stn+lr":
        built.__class__ = TunedRate
        assert isinstance(built, TunedRate)
        built.follow(step * math.log(10))
    made.append(built)
    return built


def table(name: str, rows: Sequence[Row]) -> str:
    """A line for each first learning rate and method."""
    columns = {
        "valid_loss": "best validation loss",
        "test_loss": "test loss there",
        "rate": "learning rate at the end",
        "wall_seconds": "seconds",
    }
    lines = [f"{name:>20}  " + "  ".join(f"{title:<29}" for title in columns.values()) + "  seeds"]
    for factor in sorted({row["factor"] for row in rows}):
        for method in METHODS:
            runs = [row for row in rows if (row["factor"], row["method"]) == (factor, method)]
            if not runs:
                continue
            cells = [mean_and_range([score(run, column) for run in runs]) for column in columns]
            label = f"{method}, rate x {factor:g}"
            lines.append(f"{label:>20}  " + "  ".join(f"{cell:<29}" for cell in cells) + f"  {len(runs)}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.learning_rate", description=(__doc__ or "").splitlines()[0])
    it.add_argument("recipe", nargs="?", default="digits", choices=RECIPES)
    it.add_argument("--factors", nargs="+", type=float, default=[0.1, 1.0, 4.0], help="default: .1 1 4")
    it.add_argument("--step", type=float, default=0.05, help="Adam's rate for log10 of the rate (default: %(default)s)")
    add_kept_run_flags(it)
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are not in --out yet and prints the table; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    if flags.seeds < 1 or not flags.step > 0:
        it.error(f"--seeds must be at least 1 and --step above 0; got {flags.seeds} and {flags.step}")
    try:
        kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
        defaults = replace(recipe(flags.recipe).config(), data_root=flags.data_root)
        asked = [
            {
                "recipe": flags.recipe,
                "method": method,
                "step": step,
                "factor": factor,
                "seed": seed,
                "epochs": flags.epochs,
            }
            for seed, factor in itertools.product(range(flags.seeds), flags.factors)
            for method, step in (("stn", None), ("stn+lr", flags.step))
        ]
        with tempfile.TemporaryDirectory() as scratch:
            for run in asked:
                if kept.find(run) is not None:
                    continue
                rate = defaults.optimizer.learning_rate * run["factor"]
                config = replace(
                    defaults,
                    optimizer=replace(defaults.optimizer, learning_rate=rate),
                    schedule=replace(defaults.schedule, epochs=flags.epochs or defaults.schedule.epochs),
                    seed=run["seed"],
                    run_dir=str(Path(scratch) / f"{run['method']}-{run['factor']}-{run['seed']}"),
                )
                made: list[Method] = []
                make = partial(make_method, method=run["method"], step=flags.step, made=made)
                result = measure(config, make_method=make)
                chosen = {name: result[name] for name in KEPT if name in result}
                kept.add({**run, **chosen, "rate": made[0].learning_rate})
        print(table(flags.recipe, [row for row in map(kept.find, asked) if row is not None]))
    except UserError as error:
        it.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
