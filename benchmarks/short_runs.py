"""Does self-tuning ever become non-finite at the package's defaults? Ten small tasks, a hundred seeds each.

    python -m benchmarks.short_runs --jobs 2 --out benchmarks/results/short-runs.jsonl
    python -m benchmarks.short_runs --tasks stuck low-guess --seeds 10 --method delta-stn
    python -m benchmarks.short_runs --tasks low-guess --seeds 10 --cycles 1000 --as-published

Each run is --cycles of two training steps and a validation step, with the default optimizers, clipping and entropy
weight; seeds change the split, the weights and the draws. Prints for each task the runs that became non-finite, the
largest loss of a training step relative to the first one, the range of σ at the end, and the median of last losses.

--as-published is the control, which shows that such runs can fail: one pass, the published start and β₂, and no
clipping, as the STN paper describes its image tasks.

low-guess     the README's loop with a layer more and far too little regularisation (breast cancer)
high-guess    the same from far too much
without       three dropout rates and no weight decay (wine, 178 examples)
regression    squared loss and input noise, starting a thousand times too small (diabetes)
one-output    linear regression with one output, weight decay a thousand times too small
many-outputs  linear regression with 50 outputs, from a dropout rate of .9
stuck         digits from where nothing is learnt yet: dropout .6 and .8, noise 2, decay .01
images        convolutions, dropout and cutout with integers (digits as images of 8 x 8 pixels)
batch-norm    convolutions with batch norm, from a low and a high rate
language      an LSTM with the seven hyperparameters of the STN paper, on a random Markov chain
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.self_tuning import writable
from stn_fast.command_line import run_command
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.processes import mapped
from stn_fast.data import Split, digits
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperBatch, Hyperparameter, HyperparameterSpace
from stn_fast.models import ImageClassifier, LanguageModel, fashion_cnn, plain_mlp, tuned
from stn_fast.training import task
from stn_fast.training.batches import Batches
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.methods import SelfTuning
from stn_fast.training.start import start_as_published
from stn_fast.training.streams import Streams

METHODS: Mapping[str, type[SelfTuning]] = {"stn": SelfTuning, "delta-stn": DeltaSelfTuning}
KEY = ("task", "method", "seed", "cycles", "as_published")
WARMUP = 20  # cycles without validation steps
published_adam = partial(torch.optim.Adam, lr=1e-2)


@dataclass(frozen=True)
class Problem:
    """A network with its losses, and endless sequences of batches."""

    space: HyperparameterSpace
    model: nn.Module
    training: Callable[..., Any]
    validation: Callable[..., Any]
    train: Any
    valid: Any


def space_of(**guesses: float) -> HyperparameterSpace:
    """Dropout rates up to .9 and other hyperparameters above 0, from these first guesses."""
    return HyperparameterSpace(
        [
            Hyperparameter(name, init=guess, low=0.0, high=0.9 if "dropout" in name else None)
            for name, guess in guesses.items()
        ]
    )


def classification(name: str, seed: int, train: int, hidden: Sequence[int], **guesses: float) -> Problem:
    """An MLP on one of scikit-learn's tables, standardised."""
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    inputs = torch.from_numpy((x - x.mean(0)) / (x.std(0) + 1e-6)).float()
    space = space_of(**guesses)
    model = tuned(plain_mlp((x.shape[1], *hidden, int(y.max()) + 1)), space)
    splits = parts(inputs, torch.from_numpy(y).long(), train, seed)
    return Problem(space, model, task.decayed_classification_loss, task.classification_loss, *splits)


def parts(inputs: Tensor, targets: Tensor, train: int, seed: int) -> tuple[Batches, Batches]:
    """Batches of ``train`` examples for training and of the others for validation."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    first, rest = order[:train], order[train:]
    splits = Split(inputs[first], targets[first]), Split(inputs[rest], targets[rest])
    sizes = (min(100, len(split.inputs)) for split in splits)
    one, other = (Batches(s, size, seed=seed, stream=i) for i, (s, size) in enumerate(zip(splits, sizes, strict=True)))
    return one, other


def square_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    return F.mse_loss(task.outputs(model, hyper, batch.inputs), batch.targets)


def decayed_square_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    return task.with_weight_decay(square_loss(model, batch, hyper), model, hyper)


def low_guess(seed: int) -> Problem:
    rates = dict(hidden_dropout_1=0.005, hidden_dropout_2=0.005, weight_decay=1e-6)
    return classification("breast_cancer", seed, 400, (64, 64), **rates)


def high_guess(seed: int) -> Problem:
    rates = dict(hidden_dropout_1=0.8, hidden_dropout_2=0.8, weight_decay=1.0)
    return classification("breast_cancer", seed, 400, (64, 64), **rates)


def without(seed: int) -> Problem:
    rates = dict(input_dropout=0.1, hidden_dropout_1=0.5, hidden_dropout_2=0.5)
    return classification("wine", seed, 90, (32, 32), **rates)


def regression(seed: int) -> Problem:
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy((a - a.mean(0)) / a.std(0)).float() for a in load_diabetes(return_X_y=True))
    space = space_of(input_noise=1e-3, hidden_dropout_1=1e-3, weight_decay=1e-6)
    model = tuned(plain_mlp((x.shape[1], 64, 1)), space)
    return Problem(space, model, decayed_square_loss, square_loss, *parts(x, y[:, None], 200, seed))


def linear(seed: int, outputs: int, **guesses: float) -> Problem:
    """y = x·(sparse weights) + noise: 60 training and 500 validation examples of 20 inputs."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(20, outputs)) * (rng.random((20, outputs)) < 0.5)
    x = rng.normal(size=(560, 20))
    y = x @ weights + 2.5 * rng.normal(size=(560, outputs))
    inputs, targets = (torch.from_numpy(a).float() for a in (x, y))
    space = space_of(**guesses)
    network = OrderedDict(input_dropout=nn.Dropout(0.0), linear=nn.Linear(20, outputs))
    model = tuned(nn.Sequential(network), space)
    return Problem(space, model, decayed_square_loss, square_loss, *parts(inputs, targets, 60, seed))


def one_output(seed: int) -> Problem:
    return linear(seed, 1, weight_decay=1e-3)


def many_outputs(seed: int) -> Problem:
    return linear(seed, 50, input_dropout=0.89)


def stuck(seed: int) -> Problem:
    data = digits.load()
    space = space_of(input_dropout=0.6, hidden_dropout_1=0.8, hidden_dropout_2=0.8, input_noise=2.0, weight_decay=0.01)
    model, splits = tuned(plain_mlp((64, 128, 128, 10)), space), parts(*data.train, 500, seed)
    return Problem(space, model, task.decayed_classification_loss, task.classification_loss, *splits)


def pixels(seed: int) -> tuple[Batches, Batches]:
    """scikit-learn's digits as uint8 images (N, 1, 8, 8)."""
    data = digits.load().train
    images = (data.inputs * 255).round().to(torch.uint8).reshape(-1, 1, 8, 8)
    return parts(images, data.targets, 400, seed)


def images(seed: int) -> Problem:
    space = HyperparameterSpace(
        [
            Hyperparameter("conv_dropout", init=0.05, low=0.0, high=0.95),
            Hyperparameter("last_dropout", init=0.05, low=0.0, high=0.95),
            Hyperparameter("cutout_length", init=1.5, low=0.0, high=6.0, integer=True),
            Hyperparameter("cutout_holes", init=1.5, low=0.0, high=4.0, integer=True),
            Hyperparameter("weight_decay", init=1e-4, low=0.0),
        ]
    )
    return classifier(space, fashion_cnn(image_size=8, hidden=32), seed)


def classifier(space: HyperparameterSpace, network: nn.Module, seed: int) -> Problem:
    """A network of the digits as images."""
    model = tuned(ImageClassifier(space, network, mean=(0.3,), std=(0.38,), image_size=8), space)
    return Problem(space, model, task.decayed_classification_loss, task.classification_loss, *pixels(seed))


def batch_norm(seed: int) -> Problem:
    space = space_of(conv_dropout=0.01, fc_dropout_1=0.7, weight_decay=1e-4)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(((1, 8), (8, 16)), start=1):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"conv_{number}"] = nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
        layers[f"conv_dropout_{number}"] = nn.Dropout2d(0.0)
    layers |= {"flatten": nn.Flatten(), "fc_dropout_1": nn.Dropout(0.0), "linear_1": nn.Linear(64, 10)}
    return classifier(space, nn.Sequential(layers), seed)


def language(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    words = 40
    table = rng.dirichlet(np.full(words, 0.1), size=words).cumsum(1)
    text = [0]
    for draw in rng.random(6000):
        text.append(min(int(np.searchsorted(table[text[-1]], draw)), words - 1))
    tokens = torch.tensor(text)
    dropout: dict[str, Any] = dict(init=0.3, low=0.0, high=0.95, scale=1.0)
    names = ("output_dropout", "input_dropout", "hidden_dropout", "embedding_dropout", "recurrent_dropout")
    space = HyperparameterSpace(
        [
            *(Hyperparameter(name, **dropout, per_example=name[0] in "oih") for name in names),
            Hyperparameter("activation_regularization", init=0.05, low=0.0, scale=1.0, per_example=False),
            Hyperparameter("temporal_activation_regularization", init=0.05, low=0.0, scale=1.0, per_example=False),
        ]
    )
    splits = Split(tokens[:4000], tokens[1:4001]), Split(tokens[4001:6000], tokens[4002:6001])
    train, valid = (Streams(split, 20, 10, seed=seed, stream=i) for i, split in enumerate(splits))
    model = tuned(LanguageModel(words, 32, 32, 2), space)
    return Problem(space, model, regularised_next_word_loss, next_word_loss, train, valid)


TASKS: Mapping[str, Callable[[int], Problem]] = {
    "low-guess": low_guess,
    "high-guess": high_guess,
    "without": without,
    "regression": regression,
    "one-output": one_output,
    "many-outputs": many_outputs,
    "stuck": stuck,
    "images": images,
    "batch-norm": batch_norm,
    "language": language,
}


def one_run(about: Row) -> Row:
    """The run of a task, method and seed; its entry ``diverged`` is the error if it became non-finite."""
    torch.set_num_threads(1)
    torch.manual_seed(about["seed"])
    problem = TASKS[about["task"]](about["seed"])
    options: dict[str, Any] = {"seed": about["seed"]}
    if about["as_published"]:
        start_as_published(problem.model, about["seed"], gates=0.01 if about["method"] == "stn" else 0.0)
        options |= {"clip": None, "antithetic": False, "hyper_optimizer": published_adam}
    method = METHODS[about["method"]](problem.model, problem.space, problem.training, problem.validation, **options)
    start = method.location.detach().clone()
    losses: list[float] = []
    train = valid = 0
    diverged = None
    try:
        for cycle in range(about["cycles"]):
            for _ in range(2):
                losses.append(method.train_step(problem.train[train], train + valid).item())
                train += 1
            if cycle >= WARMUP:
                method.valid_step(problem.valid[valid], train + valid)
                valid += 1
    except NonFiniteError as error:
        diverged = str(error)
    states = [*method.model.parameters(), method.location.detach(), method.raw_scale.detach()]
    if diverged is None and not all(bool(torch.isfinite(tensor).all()) for tensor in states):
        diverged = "weights or hyperparameters are not finite at the end"
    scales = method.scales()
    return {
        **about,
        "diverged": diverged,
        "first_loss": losses[0] if losses else None,
        "last_loss": statistics.mean(losses[-20:]) if losses else None,
        "largest_loss": max(losses, default=None),
        "moved": (method.location.detach() - start).abs().min().item(),  # of the hyperparameter that moved least
        "smallest_scale": scales.min().item(),
        "largest_scale": scales.max().item(),
    }


def of_a_seed(runs: Sequence[Row]) -> list[Row]:
    """The results of ``runs``; a process makes several, as it takes seconds to start."""
    return [one_run(about) for about in runs]


def table(rows: Sequence[Row]) -> str:
    """A line for each task, and the number of runs that became non-finite."""
    heads = ("non-finite", "largest / first loss", "last / first", "σ at the end")
    lines = [f"{'task':>14}  {'runs':>5}" + "".join(f"  {head:>20}" for head in heads)]
    for name in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == name]
        finite = [row for row in of_task if row["diverged"] is None]
        cells = [str(len(of_task) - len(finite)), "", "", ""]
        if finite:
            cells[1] = f"{max(row['largest_loss'] / row['first_loss'] for row in finite):.2f}"
            cells[2] = f"{statistics.median(row['last_loss'] / row['first_loss'] for row in finite):.3f}"
            low, high = min(row["smallest_scale"] for row in finite), max(row["largest_scale"] for row in finite)
            cells[3] = f"{low:.2f} to {high:.2f}"
        lines.append(f"{name:>14}  {len(of_task):>5}" + "".join(f"  {cell:>20}" for cell in cells))
    failed = [row for row in rows if row["diverged"] is not None]
    lines.append(f"{len(failed)} of {len(rows)} runs became non-finite")
    lines += [f"{row['task']}, seed {row['seed']}: {row['diverged']}" for row in failed]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.short_runs", description=(__doc__ or "").splitlines()[0])
    it.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    it.add_argument("--method", choices=list(METHODS), default="stn")
    it.add_argument("--seeds", type=int, default=100, help="seeds 0 to N - 1 (default: %(default)s)")
    it.add_argument("--cycles", type=int, default=200, help="two training steps and a validation step (default: 200)")
    it.add_argument("--as-published", action="store_true", help="the control: as the papers do, and without clipping")
    it.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each (default: 1)")
    it.add_argument("--out", metavar="FILE", help="JSON lines: finished runs are added, and not made again")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the runs that are not in the file yet and prints the table; returns 1 if one became non-finite."""
    it = parser()
    flags = it.parse_args(arguments)
    if min(flags.seeds, flags.cycles, flags.jobs) < 1:
        it.error(f"--seeds, --cycles and --jobs must be at least 1; got {flags.seeds}, {flags.cycles}, {flags.jobs}")
    try:
        kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
        about = {"method": flags.method, "cycles": flags.cycles, "as_published": flags.as_published}
        groups = [[{**about, "task": name, "seed": seed} for name in flags.tasks] for seed in range(flags.seeds)]
        missing = [[run for run in group if kept.find(run) is None] for group in groups]
        with mapped(of_a_seed, [group for group in missing if group], flags.jobs) as coming:
            for results in coming:
                for row in results:
                    kept.add(row)
    except UserError as error:
        it.error(str(error))
    rows = [row for row in map(kept.find, itertools.chain(*groups)) if row is not None]
    print(table(sorted(rows, key=lambda row: flags.tasks.index(row["task"]))))
    return int(any(row["diverged"] is not None for row in rows))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
