"""What the README's five lines bring a network of timm: Fashion-MNIST, from dropout and stochastic depth of .5.

    python -m benchmarks.five_lines --seeds 3 --jobs 2 --json benchmarks/results/five_lines.json

5,000 images to train on, 5,000 others to tune on, and all 10,000 test images, 28 x 28 as they are. The network, the
optimizer and the batches are the same for each of the three runs of a seed:

self-tuned            converted and trained by SelfTuner, two training steps per validation step; losses of the fold
plain                 the same number of epochs at the first guess
plain, same compute   as many epochs as fit into the CPU seconds of the self-tuned run

Prints validation and test loss at the end of each run, CPU seconds of its training, and the ratios of the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stn_fast as stn
from benchmarks.self_tuning import writable
from stn_fast.command_line import run_command
from stn_fast.comparison.processes import mapped
from stn_fast.data import Split, fashion_mnist, split_validation
from stn_fast.errors import UserError
from stn_fast.extras import require

Row = dict[str, Any]
GUESS = 0.5
# A small vision transformer of timm: sixteen patches of 7 x 7 pixels, three blocks of 64 units.
SHAPE = dict(img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2)
RATES = dict.fromkeys(("drop_rate", "pos_drop_rate", "proj_drop_rate", "drop_path_rate"), GUESS)
SIZE, BATCH = 5_000, 128
RUNS = ("self-tuned", "plain", "plain, same compute")


def data(root: str | None, size: int = SIZE) -> tuple[Split, Split, Split]:
    """Normalised training, validation and test images; every seed has the same."""
    images = fashion_mnist.load(root)
    rest, valid = split_validation(images.train, size, seed=0)
    _, train = split_validation(rest, size, seed=0)

    def normalised(split: Split) -> Split:
        return Split((split.inputs / 255 - images.mean[0]) / images.std[0], split.targets)

    return normalised(train), normalised(valid), normalised(images.test)


def network() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SHAPE, **RATES)
    return model


def loader(split: Split) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*split), BATCH, shuffle=True)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)


def self_tuned(train: Split, valid: Split, epochs: int) -> tuple[nn.Module, dict[str, float]]:
    """The fold, and the hyperparameters at the end."""
    tuned = stn.convert(network(), quiet=True)
    tuner = stn.SelfTuner(tuned, optimizer(tuned), loss=F.cross_entropy)
    for batch, held_out in stn.alternate(loader(train), loader(valid), train_steps=2, epochs=epochs):
        tuner.step(batch, held_out)
    return tuner.fold(), tuner.values()


def plain(train: Split, epochs: float, seconds: float = float("inf")) -> tuple[nn.Module, int]:
    """The network after that many epochs, or after the first that ends at or after ``seconds``; and its epochs."""
    model, started, done = network(), time.process_time(), 0
    of_weights = optimizer(model)
    while done < epochs and time.process_time() - started < seconds:
        for images, targets in loader(train):
            F.cross_entropy(model(images), targets).backward()
            of_weights.step()
            of_weights.zero_grad()
        done += 1
    return model, done


@torch.no_grad()
def scores(model: nn.Module, name: str, split: Split) -> Row:
    outputs = torch.cat([model.eval()(images) for images in split.inputs.split(500)])
    accuracy = (outputs.argmax(1) == split.targets).double().mean()
    return {f"{name}_loss": F.cross_entropy(outputs, split.targets).item(), f"{name}_accuracy": accuracy.item()}


def of_a_seed(about: dict[str, Any]) -> list[Row]:
    """The three runs of a seed, on one thread."""
    import timm  # noqa: F401  # before the clock runs

    torch.set_num_threads(1)
    train, valid, test = data(about["data_root"], about["size"])
    rows: list[Row] = []
    for run in RUNS:
        torch.manual_seed(about["seed"])
        started, epochs = time.process_time(), about["epochs"]
        values: dict[str, float] = {}
        if run == "self-tuned":
            model, values = self_tuned(train, valid, epochs)
        elif run == "plain":
            model, epochs = plain(train, epochs)
        else:
            model, epochs = plain(train, float("inf"), seconds=rows[0]["cpu_seconds"])
        seconds = time.process_time() - started
        row = {"run": run, "seed": about["seed"], "epochs": epochs, "cpu_seconds": seconds, "values": values}
        rows.append(row | scores(model, "valid", valid) | scores(model, "test", test))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each run, then medians over seeds, and the ratios of the losses of each seed."""
    columns = ("epochs", "valid_loss", "test_loss", "test_accuracy", "cpu_seconds")
    lines = [f"{'':>20}  {'seed':>6}  " + "  ".join(f"{column.replace('_', ' '):>13}" for column in columns)]
    for run in RUNS:
        of_run = [row for row in rows if row["run"] == run]
        shown = [(str(row["seed"]), row) for row in of_run]
        shown.append(("median", {column: statistics.median(row[column] for row in of_run) for column in columns}))
        for seed, row in shown:
            cells = "  ".join(f"{row[column]:>13.4g}" for column in columns)
            lines.append(f"{run:>20}  {seed:>6}  {cells}")
    for run in RUNS[1:]:
        for loss in ("valid_loss", "test_loss"):
            each = ", ".join(f"{one:.3f}" for one in ratios(rows, run, loss))
            lines.append(f"{loss.replace('_', ' ')}, self-tuned / {run}, of each seed: {each}")
    return "\n".join(lines)


def ratios(rows: Sequence[Row], run: str, loss: str) -> list[float]:
    """The loss of the self-tuned network relative to that of another run, of each seed."""
    one, other = ([row[loss] for row in rows if row["run"] == name] for name in (RUNS[0], run))
    return [ours / theirs for ours, theirs in zip(one, other, strict=True)]


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.five_lines", description=(__doc__ or "").splitlines()[0])
    it.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1 (default: %(default)s)")
    it.add_argument("--epochs", type=int, default=18, help="of the self-tuned network (default: %(default)s)")
    it.add_argument("--size", type=int, default=SIZE, help="training and validation images (default: %(default)s)")
    it.add_argument("--jobs", type=int, default=1, help="seeds at the same time, one thread each (default: 1)")
    it.add_argument("--data-root", metavar="DIR", default=os.environ.get("STN_FAST_DATA"), help="data sets' folder")
    it.add_argument("--json", metavar="FILE", help="write every row here")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    it = parser()
    flags = it.parse_args(arguments)
    if min(flags.seeds, flags.epochs, flags.size, flags.jobs) < 1:
        it.error("--seeds, --epochs, --size and --jobs must be at least 1")
    try:
        require("timm")
        out = writable(flags.json, "--json") if flags.json else None
        about = dict(epochs=flags.epochs, size=flags.size, data_root=flags.data_root)
        with mapped(of_a_seed, [{**about, "seed": seed} for seed in range(flags.seeds)], flags.jobs) as coming:
            rows = [row for of_seed in coming for row in of_seed]
    except UserError as error:
        it.error(str(error))
    print(table(rows))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
