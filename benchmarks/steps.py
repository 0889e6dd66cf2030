"""Whole steps of the self-tuning AlexNet on CIFAR-sized images, against the published ones in eager torch.

    python -m benchmarks.steps --json benchmarks/results/steps-cpu.json

A step is perturbation, forward, backward and optimizer: `train` and `valid` on floats, `train_with_data` from uint8
images, which the published code augments one by one. Both sides take turns in one process; ratios below 1 are faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import published
from benchmarks.augmentation import MEAN, STD
from benchmarks.baselines import Range
from benchmarks.ratios import Row, device_name, versions, write
from benchmarks.timing import Provider, Timings, interleave, peak_bytes
from stn_fast.command_line import run_command

MODES = ("train", "valid", "train_with_data")


def steps(mode: str, batch: int) -> dict[str, Provider]:
    """The package's step and the published one, each on its own copy of the network."""
    from stn_fast.models import ImageClassifier, alexnet
    from stn_fast.recipes import recipe
    from stn_fast.training import task
    from stn_fast.training.methods import SelfTuning
    from stn_fast.training.spaces import build_space

    torch.manual_seed(0)
    config = recipe("cifar10").config()
    space = build_space(config)
    images, targets = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (batch,))
    if mode != "train_with_data":
        images = torch.randn(images.shape)

    network = alexnet(space)
    model = ImageClassifier(space, network, mean=MEAN, std=STD, image_size=32) if mode == "train_with_data" else network
    method = SelfTuning(model, space, task.classification_loss, task.classification_loss, seed=0)
    count = iter(range(10**9))

    ranges = [Range(h.low, h.high, h.integer) for h in space]
    theirs = published.Trainer(space.names, ranges, *space.initial_state())
    if mode == "valid":
        return {
            "stn_fast": Provider(lambda _: method.valid_step((images, targets), next(count))),
            "published": Provider(lambda _: theirs.valid_step(images, targets)),
        }
    return {
        "stn_fast": Provider(lambda _: method.train_step((images, targets), next(count))),
        "published": Provider(lambda _: theirs.train_step(images, targets)),
    }


def rows_of(
    op: str,
    mode: str,
    shape: Sequence[int],
    providers: dict[str, Provider],
    timings: Timings,
    device: torch.device,
) -> list[Row]:
    """One row for every provider, as `benchmarks.ratios` writes them; the published step is the eager one."""
    return [
        {
            "op": op,
            "mode": mode,
            "shape": list(shape),
            "dtype": "float32",
            "provider": name,
            **{f"p{q}": round(timings.percentile(name, q), 2) for q in (20, 50, 80)},
            "ratio_to_limit": None,
            "ratio_to_eager": round(timings.ratio(name, "published"), 4),
            "peak_bytes": peak_bytes(provider, device),
            "device": device_name(device),
            "versions": versions(),
        }
        for name, provider in providers.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each mode, warm-up not counted")
    parser.add_argument("--rounds", type=int, default=15, help="at least so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    print(device_name(device))
    rows: list[Row] = []
    for mode in options.modes:
        providers = steps(mode, options.batch)
        timings = interleave(providers, device, options.seconds, options.rounds)
        shape = (options.batch, 3, 32, 32)
        rows += rows_of("alexnet_step", mode, shape, providers, timings, device)
        ours, theirs = (timings.percentile(name, 50) / 1e3 for name in providers)
        ratio = timings.ratio("stn_fast", "published")
        print(f"{mode:<16} stn_fast {ours:8.1f} ms   published {theirs:8.1f} ms   ratio {ratio:.3f}", flush=True)
        if options.json:
            write(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
