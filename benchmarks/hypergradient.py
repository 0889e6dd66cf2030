"""Why a hyperparameter moves or does not: its hypergradient, and the loss that training at other values arrives at.

    python -m benchmarks.hypergradient digits --guess .7
    python -m benchmarks.hypergradient ptb-small --guess .05 --horizons 10 50 200 --jobs 2 --out FILE --figure FILE

Trains a run and examines its states after --at of its steps. For each hyperparameter, with λ in unconstrained units:

gradient   dF/dλ as validation steps compute it, through the response: mean over --batches validation batches and draws,
           its standard error, and the signal-to-noise ratio of one step, |mean| / standard deviation
K = 0      [F(λ + δ) − F(λ − δ)] / 2δ on the whole validation set, through the response, without training: differs from
           the gradient by curvature, and by the perturbation of validation steps if σ is tuned
K steps    the same after training goes on for K steps at λ ± δ, from the same state, on the same batches and from the
           same random numbers: what moving λ does to the loss. Mean over --draws seeds of the random numbers

A gradient far below its deviation is lost in noise; K = 0 that differs from small K is a response that does not fit;
small K that differs from large K is a horizon that is too short. --horizons ends with "rest" for the rest of the run.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.self_tuning import add_run_flags, check_run_flags, sharing, writable
from stn_fast.command_line import run_command
from stn_fast.comparison.guesses import guessed
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.processes import Processes
from stn_fast.comparison.runs import digest
from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config
from stn_fast.training.layering import resolve
from stn_fast.values import to_json

if TYPE_CHECKING:
    from stn_fast.training.methods import SelfTuning
    from stn_fast.training.trainer import Trainer

METHODS = ("stn", "delta-stn")
KEY = ("recipe", "method", "guess", "seed", "settings", "how", "step", "hyperparameter")
REST = "rest"


@dataclass(frozen=True)
class How:
    """How a state is examined: δ, validation batches, draws of the training, and numbers of training steps."""

    width: float
    batches: int
    draws: int
    horizons: tuple[int | str, ...]


@dataclass(frozen=True)
class Unit:
    """One hyperparameter at one state of a run."""

    config: Config
    state: Path  # a checkpoint
    name: str
    how: How


def states(config: Config, shares: Sequence[float], folder: Path) -> list[Path]:
    """Trains as ``config`` says up to the largest share of its steps; returns a checkpoint for each share."""
    from stn_fast.training import checkpoint
    from stn_fast.training.run import run

    kept = []
    build = recipe(config.recipe).build
    total = steps_of(config)
    for share in sorted(shares):
        step = max(1, round(share * total))
        run(replace(config, schedule=replace(config.schedule, max_steps=step)), build)
        found = checkpoint.path_of(Path(config.directory) / "checkpoints", step)
        kept.append(shutil.copytree(found, folder / found.name, dirs_exist_ok=True))
    return kept


def steps_of(config: Config) -> int:
    """The training and validation steps of a whole run."""
    from stn_fast.training.run import checked_task

    task, method = checked_task(config, recipe(config.recipe).build), config.method
    sequence = task.batching.sequence(task.data.train, config.schedule.batch_size, seed=0, stream=0)
    training = config.schedule.epochs * sequence.per_pass
    tuning = max(0, training - method.warmup_epochs * sequence.per_pass)
    return training + tuning // method.train_steps * method.valid_steps


def trainer_at(config: Config, state: Path) -> tuple[Trainer, SelfTuning, Callable[[], None]]:
    """A trainer in the state of a checkpoint, its method, and a function that brings it back to that state."""
    from stn_fast.training import checkpoint
    from stn_fast.training.build import build_method
    from stn_fast.training.methods import SelfTuning
    from stn_fast.training.run import checked_task
    from stn_fast.training.trainer import Trainer

    task = checked_task(config, recipe(config.recipe).build)
    method = build_method(config, task)
    assert isinstance(method, SelfTuning)
    trainer, saved = Trainer(config, task, method, state.parent), checkpoint.read(state)

    def back() -> None:
        trainer.load_state_dict(copy.deepcopy(saved))  # steps update the optimizer's tensors that are loaded in place

    back()
    return trainer, method, back


def examine(unit: Unit) -> Row:
    """The gradients and differences of one hyperparameter at one state."""
    from stn_fast.training.run import using_threads

    with using_threads(unit.config.threads):
        return _examine(unit)


def _examine(unit: Unit) -> Row:
    config, how = unit.config, unit.how
    trainer, method, back = trainer_at(config, unit.state)
    column = method.space.index(unit.name)
    gradients = validation_gradients(trainer, method, how.batches, column)
    back()
    location = method.location.detach().clone()
    left = steps_of(config) - trainer.step
    steps = {"0": 0} | {K: left if K == REST else int(K) for K in how.horizons}
    named = {K: steps[K] for K in sorted(steps, key=steps.__getitem__) if steps[K] <= left}
    moved = {sign: location.clone() for sign in (+1, -1)}
    for sign, there in moved.items():
        there[column] += sign * how.width
    losses = {
        sign: [along(trainer, method, back, there, list(named.values()), draw) for draw in range(how.draws)]
        for sign, there in moved.items()
    }
    differences = {
        name: [(up[K] - down[K]) / (2 * how.width) for up, down in zip(losses[+1], losses[-1], strict=True)]
        for name, K in named.items()
    }
    deviation = statistics.stdev(gradients)
    mean = statistics.mean(gradients)
    return {
        "value": method.space.values(location)[unit.name],
        "scale": method.scales()[column].item(),
        "gradient": mean,
        "standard_error": deviation / math.sqrt(len(gradients)),
        "signal_to_noise": abs(mean) / deviation if deviation else math.inf,
        "differences": differences,
        "rest": left,
    }


def validation_gradients(trainer: Trainer, method: SelfTuning, batches: int, column: int) -> list[float]:
    """dF/dλ of one hyperparameter on each of the next validation batches, each with draws of its own."""
    found = []
    for number in range(batches):
        batch = trainer.valid_batches[trainer.valid_steps + number]
        _, (of_location, *_) = method.hypergradients(batch, trainer.step + number)
        found.append(of_location[column].item())
    return found


def along(
    trainer: Trainer, method: SelfTuning, back: Callable[[], None], there: Any, horizons: Sequence[int], draw: int
) -> dict[int, float]:
    """Validation losses after each number of training steps at the location ``there``, from the trainer's state."""
    import torch

    back()
    valid, seed, center = trainer.task.data.valid, method.seed, method.center
    with torch.no_grad():
        method.location.copy_(there)

    def at_old_center(examples: int) -> Any:
        return method.space.at(method.location.detach(), batch_size=examples, center=center)

    method.seed = seed + 1000 * draw
    losses, done = {}, 0
    for horizon in horizons:
        for number in range(done, horizon):
            method.train_step(trainer.train_batches[trainer.train_steps + number], trainer.step + number)
        done = horizon
        losses[horizon] = trainer.evaluate(valid, None if horizon else at_old_center)["loss"]
    method.seed = seed
    return losses


@contextmanager
def examined(units: Sequence[Unit], jobs: int) -> Iterator[Iterable[Row]]:
    """Yields the rows of ``units`` in order, ``jobs`` at a time."""
    if jobs == 1:
        yield map(examine, units)
        return
    with Processes(jobs) as processes:
        yield processes.map(examine, units)


def table(rows: Sequence[Row]) -> str:
    """A line for each hyperparameter and state, and how often the gradient's sign is that of the differences."""
    horizons = sorted({K for row in rows for K in row["differences"]}, key=lambda K: math.inf if K == REST else int(K))
    columns = ["value", "σ", "gradient", "± error", "S/N", *(K if K == REST else f"K = {K}" for K in horizons)]
    lines = []
    for step in dict.fromkeys(row["step"] for row in rows):
        lines.append(f"{f'after step {step}':>36}" + "".join(f"{head:>10}" for head in columns))
        for row in (row for row in rows if row["step"] == step):
            numbers = [row[key] for key in ("value", "scale", "gradient", "standard_error", "signal_to_noise")]
            numbers += [statistics.mean(row["differences"].get(K, [math.nan])) for K in horizons]
            cells = "".join(f"{'' if math.isnan(number) else f'{number:.2g}':>10}" for number in numbers)
            lines.append(f"{row['hyperparameter']:>36}{cells}")
    for horizon in horizons:
        known = [row for row in rows if horizon in row["differences"]]
        same = sum(row["gradient"] * statistics.mean(row["differences"][horizon]) > 0 for row in known)
        says = "the rest of the run" if horizon == REST else f"K = {horizon}"
        lines.append(f"{says}: the gradient has the sign of the difference in {same} of {len(known)}")
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """A panel for each hyperparameter: differences by number of steps, with the gradient as a dashed line."""
    from stn_fast.plot import COLOURS, new_figure

    names = list(dict.fromkeys(row["hyperparameter"] for row in rows))
    steps = list(dict.fromkeys(row["step"] for row in rows))
    figure = new_figure(3.3 * min(4, len(names)), 2.6 * -(-len(names) // 4) + 0.4)
    panels = figure.subplots(-(-len(names) // 4), min(4, len(names)), squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        panel.set_title(name.replace("_", " "), fontsize=9)
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.set_xscale("symlog", linthresh=5)
        panel.tick_params(labelsize=7)
        for row in (row for row in rows if row["hyperparameter"] == name):
            colour = COLOURS[steps.index(row["step"]) % len(COLOURS)]
            horizons = [row["rest"] if K == REST else int(K) for K in row["differences"]]
            means = [statistics.mean(values) for values in row["differences"].values()]
            panel.plot(horizons, means, "o-", color=colour, markersize=3, label=f"step {row['step']}")
            low, high = (row["gradient"] + sign * 2 * row["standard_error"] for sign in (-1, 1))
            panel.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
            panel.axhline(row["gradient"], color=colour, linestyle="--", linewidth=1)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    figure.supxlabel("training steps at λ ± δ", fontsize=9)
    figure.supylabel("dF/dλ; dashed: through the response", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=150)


def parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").splitlines()[0]
    it = argparse.ArgumentParser(prog="python -m benchmarks.hypergradient", description=about)
    it.add_argument("recipe", choices=list(RECIPES))
    it.add_argument("--method", choices=METHODS, default="stn")
    it.add_argument("--guess", type=float, metavar="RATE", help="first guess of every dropout rate (default: recipe's)")
    it.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key of the recipe")
    it.add_argument("--at", nargs="+", type=float, default=[0.1, 0.4, 0.8], metavar="SHARE", help="of the run's steps")
    it.add_argument("--horizons", nargs="+", default=["10", "50", "200"], metavar="K", help=f"steps, or {REST}")
    it.add_argument("--width", type=float, default=0.5, metavar="δ", help="in unconstrained units (default: 0.5)")
    it.add_argument("--batches", type=int, default=30, help="validation batches of the gradient (default: 30)")
    it.add_argument("--draws", type=int, default=1, help="seeds of the continued training (default: 1)")
    it.add_argument("--out", metavar="FILE", help="JSON lines: finished rows are added, and not made again")
    it.add_argument("--figure", metavar="FILE", help="write a picture here")
    add_run_flags(it, seeds=1)
    return it


def compute(flags: argparse.Namespace) -> list[Row]:
    """Makes the rows that are not in --out yet and returns all that are asked for.

    Raises:
        UserError: a flag's value is wrong.
    """
    wrong = [K for K in flags.horizons if K != REST and not (K.isdigit() and int(K) > 0)]
    if wrong or any(not 0 < share <= 1 for share in flags.at) or flags.batches < 2 or flags.width <= 0:
        raise UserError("--horizons must be whole numbers above 0, --at above 0 and at most 1, --batches at least 2")
    kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
    how = How(flags.width, flags.batches, flags.draws, tuple(flags.horizons))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(flags.seeds):
            defaults = replace(recipe(flags.recipe).config(), data_root=flags.data_root)
            pairs = [f"method.name={flags.method}", *flags.set]
            base = guessed(sharing(resolve(defaults, pairs=pairs), flags.jobs), flags.guess)
            schedule = replace(base.schedule, epochs=flags.epochs or base.schedule.epochs)
            folder = Path(flags.run_dir or scratch) / f"{flags.method}-{flags.guess}-seed{seed}"
            config = replace(base, seed=seed, run_dir=str(folder), schedule=schedule)
            about = {"recipe": flags.recipe, "method": flags.method, "guess": flags.guess, "seed": seed}
            about |= {"settings": digest(config), "how": to_json(asdict(how))}
            asked = [
                {**about, "step": max(1, round(share * steps_of(config))), "hyperparameter": name}
                for share in sorted(flags.at)
                for name in config.enabled
            ]
            missing = [row for row in asked if kept.find(row) is None]
            if missing:
                found = {int(path.name[5:]): path for path in states(config, flags.at, Path(scratch) / str(seed))}
                units = [Unit(config, found[row["step"]], row["hyperparameter"], how) for row in missing]
                with examined(units, flags.jobs) as coming:
                    for number, (row, result) in enumerate(zip(missing, coming, strict=True), 1):
                        kept.add({**row, **result, "set": flags.set})
                        print(f"{number} of {len(missing)}: {row['hyperparameter']}", flush=True)
            rows += [row for row in map(kept.find, asked) if row is not None]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Examines and prints; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    check_run_flags(it, flags)
    try:
        rows = compute(flags)
    except UserError as error:
        it.error(str(error))
    for seed in range(flags.seeds):
        of_seed = [row for row in rows if row["seed"] == seed]
        print(f"\n{flags.recipe}, {flags.method}, seed {seed}\n{table(of_seed)}", flush=True)
        if flags.figure and seed == 0:
            draw(of_seed, Path(flags.figure))
    if flags.json:
        Path(flags.json).write_text(to_json(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
