"""Why a hyperparameter moves or does not: its hypergradient, and the loss that training at other values arrives at.

    python -m benchmarks.hypergradient digits-small --guess .3 --draws 3
    python -m benchmarks.hypergradient ptb-small --guess .05 --horizons 10 50 200 --jobs 2 --out FILE --figure FILE

Trains a run and examines its states after the shares --at of its steps. For each hyperparameter, with λ in
unconstrained units:

gradient   dF/dλ as validation steps compute it, through the response: mean over --batches validation batches, its
           standard error, and the signal-to-noise ratio of one step, |mean| / standard deviation
K = 0      [F(λ + δ) − F(λ − δ)] / 2δ on the whole validation set through the response, without training. It differs
           from the gradient by curvature and, if σ is tuned, by the perturbation of validation steps
fitted     the same after --fit more steps that train the response alone, at these weights
K steps    the same difference after K training steps with the regularisation of λ ± δ, which both start from the
           weights at λ: the response's center is moved along. What training does, whatever the response predicts. Mean
           over --draws seeds of the random numbers, and its standard error

A gradient far below its deviation is lost in noise. A gradient that agrees with no K is that of a response that does
not fit; if the fitted difference agrees, the response lags behind the weights, and if not, its form is too small.
Where small K and large K disagree, what helps soon does harm later, or the reverse: a horizon, to which no
fit of the response is an answer. --horizons may end with "rest", the training steps that are left.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.self_tuning import add_run_flags, check_run_flags, sharing, writable
from stn_fast.command_line import run_command
from stn_fast.comparison.guesses import guessed
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.processes import mapped
from stn_fast.comparison.runs import digest
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.layering import resolve
from stn_fast.values import to_json

if TYPE_CHECKING:
    from torch import Tensor

    from stn_fast.hyperparameters import HyperBatch
    from stn_fast.training.batches import BatchSequence
    from stn_fast.training.methods import SelfTuning
    from stn_fast.training.trainer import Trainer

METHODS = ("stn", "delta-stn")
KEY = ("recipe", "method", "guess", "seed", "settings", "how", "step", "hyperparameter")
REST = "rest"


@dataclass(frozen=True)
class How:
    """How a state is examined: δ, validation batches, response steps, draws of the training, and training steps."""

    width: float
    batches: int
    fit: int
    draws: int
    horizons: tuple[int | str, ...]


@dataclass(frozen=True)
class Unit:
    """A hyperparameter at a state of a run; without a name, the gradients of all of them there."""

    config: Config
    state: Path  # a checkpoint
    name: str | None
    how: How


def states(config: Config, steps: Sequence[int], folder: Path) -> dict[int, Path]:
    """Trains as ``config`` says up to the last of ``steps``, which ascend; returns the checkpoint after each.

    Raises:
        UserError: the run ends before.
    """
    from stn_fast.training import checkpoint
    from stn_fast.training.run import run

    kept = {}
    build = recipe(config.recipe).build
    for step in steps:
        result = run(replace(config, schedule=replace(config.schedule, max_steps=step)), build)
        if result["steps"] < step:
            raise UserError(
                f"{result['ended_by']} ended the run after {result['steps']} steps, and --at asks for {step}: turn it "
                "off by --set, or ask for smaller shares"
            )
        found = checkpoint.path_of(Path(config.directory) / "checkpoints", step)
        kept[step] = shutil.copytree(found, folder / found.name, dirs_exist_ok=True)
    return kept


def steps_at(config: Config, shares: Sequence[float]) -> list[int]:
    """The numbers of training and validation steps that are the ``shares`` of a whole run, ascending."""
    from stn_fast.training.run import checked_task

    task, method = checked_task(config, recipe(config.recipe).build), config.method
    sequence = task.batching.sequence(task.data.train, config.schedule.batch_size, seed=0, stream=0)
    training = training_steps(config, sequence)
    tuning = max(0, training - method.warmup_epochs * sequence.per_pass)
    total = training + tuning // method.train_steps * method.valid_steps
    return sorted({max(1, round(share * total)) for share in shares})


def training_steps(config: Config, batches: BatchSequence) -> int:
    """The training steps of a whole run."""
    return config.schedule.epochs * batches.per_pass


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
    space, seed = method.space, method.seed

    def back() -> None:
        method.seed = seed
        use(method, space)
        trainer.load_state_dict(copy.deepcopy(saved))  # steps update the optimizer's tensors that are loaded in place

    back()
    return trainer, method, back


def examine(unit: Unit) -> Any:
    """The differences of a hyperparameter at a state, or the gradients of all of them by name."""
    from stn_fast.training.run import using_threads

    with using_threads(unit.config.threads):
        trainer, method, back = trainer_at(unit.config, unit.state)
        if unit.name is None:
            return of_all(trainer, method, unit.how)
        return differences(trainer, method, back, unit.name, unit.how)


def of_all(trainer: Trainer, method: SelfTuning, how: How) -> dict[str, Row]:
    """The gradients and the fitted differences of every hyperparameter, by name."""
    found = validation_gradients(trainer, method, how.batches)
    fit_response(trainer, method, how.fit)
    for name, row in found.items():
        row["fitted"] = through_the_response(trainer, method, name, how.width)
    return found


def fit_response(trainer: Trainer, method: SelfTuning, steps: int) -> None:
    """Takes ``steps`` training steps that change the response alone."""
    from stn_fast.training.delta import DeltaSelfTuning
    from stn_fast.training.parameters import hold_parameters, is_response

    weights = [parameter for name, parameter in method.model.named_parameters() if not is_response(name)]
    for number in range(steps):
        batch, step = trainer.train_batches[trainer.train_steps + number], trainer.step + number
        if isinstance(method, DeltaSelfTuning):
            method.response_step(batch, step)
            continue
        with hold_parameters(weights):
            method.train_step(batch, step)


def validation_gradients(trainer: Trainer, method: SelfTuning, batches: int) -> dict[str, Row]:
    """dF/dλ of every hyperparameter over the next validation batches, by name."""
    import torch

    found = []
    for number in range(batches):
        batch = trainer.valid_batches[trainer.valid_steps + number]
        _, (of_location, *_) = method.hypergradients(batch, trainer.step + number)
        found.append(of_location)
    gradients = torch.stack(found).double()
    means, deviations, scales = gradients.mean(0).tolist(), gradients.std(0).tolist(), method.scales().tolist()
    values = method.space.values(method.location)
    return {
        name: {
            "value": values[name],
            "scale": scale,
            "gradient": mean,
            "standard_error": deviation / math.sqrt(batches),
            "signal_to_noise": abs(mean) / deviation if deviation else math.inf,
        }
        for name, mean, deviation, scale in zip(method.space.names, means, deviations, scales, strict=True)
    }


def differences(trainer: Trainer, method: SelfTuning, back: Callable[[], None], name: str, how: How) -> Row:
    """Central differences of the validation loss for each horizon: one for every draw, null where it is not finite."""
    back()
    left = training_steps(trainer.config, trainer.train_batches) - trainer.train_steps
    steps = {str(K): left if K == REST else int(K) for K in how.horizons}
    named = {K: steps[K] for K in sorted(steps, key=steps.__getitem__) if steps[K] <= left}
    found: dict[str, list[float | None]] = {"0": [through_the_response(trainer, method, name, how.width)]}
    found |= {K: [] for K in named}
    for draw in range(how.draws):
        going = partial(along, trainer, method, back, name, horizons=list(named.values()), draw=draw)
        high, low = going(how.width), going(-how.width)
        for K, number in named.items():
            both = number in high and number in low
            found[K].append((high[number] - low[number]) / (2 * how.width) if both else None)
    return {"differences": found, "rest": left}


def through_the_response(trainer: Trainer, method: SelfTuning, name: str, width: float) -> float:
    """The central difference without training: the weights change as the response says."""
    center = None if method.center is None else method.center.clone()
    losses = []
    for sign in (1, -1):
        there = method.location.detach().clone()
        there[method.space.index(name)] += sign * width

        def moved(examples: int, there: Tensor = there) -> HyperBatch:
            return method.space.at(there, batch_size=examples, center=center)

        losses.append(trainer.evaluate(trainer.task.data.valid, moved)["loss"])
    return (losses[0] - losses[1]) / (2 * width)


def along(
    trainer: Trainer,
    method: SelfTuning,
    back: Callable[[], None],
    name: str,
    shift: float,
    horizons: Sequence[int],
    draw: int,
) -> dict[int, float]:
    """Validation losses after each number of training steps with the location of a hyperparameter shifted.

    Training starts from the trainer's state and from the same weights, whatever the shift: the center of the response
    is shifted too. The losses end where one is not finite.
    """
    import torch

    back()
    method.seed += 1000 * draw
    column = method.space.index(name)
    use(method, shifted(method.space, name, shift))
    with torch.no_grad():
        method.location[column] += shift
    losses: dict[int, float] = {}
    done = 0
    for horizon in horizons:
        try:
            for number in range(done, horizon):
                method.train_step(trainer.train_batches[trainer.train_steps + number], trainer.step + number)
        except NonFiniteError:
            break
        done = horizon
        losses[horizon] = trainer.evaluate(trainer.task.data.valid)["loss"]
    return losses


def use(method: SelfTuning, space: HyperparameterSpace) -> None:
    """Makes a method and its converted model use another space of the same hyperparameters."""
    from stn_fast.conversion.folding import tuned_of

    method.space = tuned_of("hypergradient", method.model).space = space


def shifted(space: HyperparameterSpace, name: str, shift: float) -> HyperparameterSpace:
    """``space`` with the first location of a hyperparameter, and so the center of its response, shifted."""
    continuous = HyperparameterSpace([replace(each, integer=False) for each in space])
    start, _ = continuous.initial_state()
    start[space.index(name)] += shift
    init = continuous.values(start)[name]
    return HyperparameterSpace([replace(each, init=init) if each.name == name else each for each in space])


def table(rows: Sequence[Row]) -> str:
    """A line for each hyperparameter and state, and how often the gradient's sign is that of the differences."""
    horizons = sorted({K for row in rows for K in row["differences"]}, key=lambda K: math.inf if K == REST else int(K))
    columns = ["value", "σ", "gradient", "± error", "S/N", "fitted"]
    wide = [K if K == REST else f"K = {K}" for K in horizons]
    lines = []
    for step in dict.fromkeys(row["step"] for row in rows):
        heads = [f"{head:>10}" for head in columns] + [f"{head:>18}" for head in wide]
        lines.append(f"{f'after step {step}':>36}" + "".join(heads))
        for row in (row for row in rows if row["step"] == step):
            names = ("value", "scale", "gradient", "standard_error", "signal_to_noise", "fitted")
            numbers = [row[key] for key in names]
            cells = [f"{number:>10.2g}" for number in numbers] + [f"{cell(row, K):>18}" for K in horizons]
            lines.append(f"{row['hyperparameter']:>36}" + "".join(cells))
    for horizon in horizons:
        means = [(row["gradient"], mean_and_error(row, horizon)) for row in rows]
        known = [(gradient, *found) for gradient, found in means if found is not None]
        clear = [gradient * mean > 0 for gradient, mean, error in known if abs(mean) > 2 * error]
        says = "the rest of the run" if horizon == REST else f"K = {horizon}"
        lines.append(
            f"{says}: the gradient has the sign of the difference in {sum(g * m > 0 for g, m, _ in known)} of "
            f"{len(known)}; where the difference is more than two errors from 0, in {sum(clear)} of {len(clear)}"
        )
    return "\n".join(lines)


def mean_and_error(row: Row, horizon: str) -> tuple[float, float] | None:
    """The mean over draws and its standard error, which is 0 for a single one; None where any is not finite."""
    values = row["differences"].get(horizon)
    if not values or None in values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.mean(values), error


def cell(row: Row, horizon: str) -> str:
    """The mean ± its error; empty if it was not measured."""
    found = mean_and_error(row, horizon)
    if found is None:
        return "not finite" if horizon in row["differences"] else ""
    mean, error = found
    return f"{mean:.2g} ± {error:.1g}" if error else f"{mean:.2g}"


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
            found = {K: mean_and_error(row, K) for K in row["differences"]}
            places = [row["rest"] if K == REST else int(K) for K, known in found.items() if known]
            means, errors = zip(*(known for known in found.values() if known), strict=True)
            style: dict[str, Any] = dict(color=colour, markersize=3, linewidth=1.2, elinewidth=0.8)
            panel.errorbar(
                places, means, [2 * error for error in errors], fmt="o-", label=f"step {row['step']}", **style
            )
            panel.axhline(row["gradient"], color=colour, linestyle="--", linewidth=1)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    figure.supxlabel("training steps at λ ± δ", fontsize=9)
    figure.supylabel("dF/dλ; dashed: the method's", fontsize=9)
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=130)


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
    it.add_argument("--fit", type=int, default=100, help="steps of the response alone, for `fitted` (default: 100)")
    it.add_argument("--draws", type=int, default=1, help="seeds of the continued training (default: 1)")
    it.add_argument("--out", metavar="FILE", help="JSON lines: finished rows are added, and not made again")
    it.add_argument("--figure", metavar="FILE", help="write a picture here")
    add_run_flags(it, seeds=1)
    return it


def check(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag's value is wrong."""
    wrong = {
        "--horizons": any(K != REST and not (K.isdigit() and int(K) > 0) for K in flags.horizons),
        "--at": any(not 0 < share <= 1 for share in flags.at),
        "--width": not flags.width > 0,
        "--batches": flags.batches < 2,
        "--fit": flags.fit < 0,
        "--draws": flags.draws < 1,
    }
    right = (
        f"numbers of steps above 0 or {REST}, shares above 0 and at most 1, above 0, at least 2, at least 0, at least 1"
    )
    for (flag, is_wrong), what in zip(wrong.items(), right.split(", "), strict=True):
        if is_wrong:
            raise UserError(f"{flag} {getattr(flags, flag[2:])}: must be {what}")


def compute(flags: argparse.Namespace) -> list[Row]:
    """Makes the rows that are not in --out yet and returns all that are asked for.

    Raises:
        UserError: a flag's value is wrong, or the run ends before a state that is asked for.
    """
    check(flags)
    kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
    how = How(flags.width, flags.batches, flags.fit, flags.draws, tuple(flags.horizons))
    defaults = replace(recipe(flags.recipe).config(), data_root=flags.data_root)
    base = sharing(resolve(defaults, pairs=[f"method.name={flags.method}", *flags.set]), flags.jobs)
    if base.method.response != "shifted":
        raise UserError("method.response must be shifted, as a raw response or that to a value has no center")
    base = guessed(
        replace(
            base,
            schedule=replace(base.schedule, epochs=flags.epochs or base.schedule.epochs),
            optimizer=replace(base.optimizer, average=0.0),  # training is the same, and losses are those of its weights
        ),
        flags.guess,
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(flags.seeds):
            folder = Path(flags.run_dir or scratch) / f"{flags.method}-{flags.guess}-seed{seed}"
            config = replace(base, seed=seed, run_dir=str(folder))
            about = {"recipe": flags.recipe, "method": flags.method, "guess": flags.guess, "seed": seed}
            about |= {"settings": digest(config), "how": to_json(asdict(how))}
            steps = steps_at(config, flags.at)
            asked = [{**about, "step": step, "hyperparameter": name} for step in steps for name in config.enabled]
            missing = [row for row in asked if kept.find(row) is None]
            if missing:
                found = states(config, steps, Path(scratch) / str(seed))
                for row in made(missing, config, found, how, flags.jobs):
                    kept.add({**row, "set": flags.set})
            rows += [row for row in map(kept.find, asked) if row is not None]
    return rows


def made(missing: Sequence[Row], config: Config, found: Mapping[int, Path], how: How, jobs: int) -> Iterator[Row]:
    """The rows that are ``missing``, from the checkpoints by step that were ``found``."""
    steps = list(dict.fromkeys(row["step"] for row in missing))
    gradients = [Unit(config, found[step], None, how) for step in steps]
    units = [Unit(config, found[row["step"]], row["hyperparameter"], how) for row in missing]
    with mapped(examine, [*gradients, *units], jobs) as coming:
        of_state = {step: next(coming) for step in steps}
        for number, (row, result) in enumerate(zip(missing, coming, strict=True), 1):
            yield {**row, **of_state[row["step"]][row["hyperparameter"]], **result}
            print(f"{number} of {len(missing)}: {row['hyperparameter']} after step {row['step']}", flush=True)


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
