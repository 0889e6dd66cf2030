"""Runs a few steps of every recipe at its real sizes, on random data, to check that everything works here.

    python -m benchmarks.smoke cifar10 ptb --device cuda --steps 6

Warm-up is skipped, so that both training and validation steps are run.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from stn_fast.command_line import run_command
from stn_fast.data import Images, Split
from stn_fast.data.text import Corpus
from stn_fast.errors import UserError, did_you_mean

# The other recipes train the networks of these on other texts.
NETWORKS = ("digits", "fashion-mnist-small", "fashion-mnist", "cifar10", "ptb-small", "ptb")
VOCABULARY = 10_000


def random_images(channels: int, side: int, train: int, test: int = 200) -> Images:
    """Random images with independent random labels."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(10, (count,), generator=generator))

    return Images(split(train), split(test), (0.5,) * channels, (0.25,) * channels)


def random_text(train: int, test: int = 2000) -> Corpus:
    """A text of independent random words."""
    generator = torch.Generator().manual_seed(0)
    texts = (torch.randint(VOCABULARY, (count,), generator=generator) for count in (train, test, test))
    return Corpus(next(texts), next(texts), next(texts), ("<eos>", "<unk>", *(f"w{k}" for k in range(VOCABULARY - 2))))


@contextmanager
def random_data() -> Iterator[None]:
    """Inside, the recipes load fewer examples of random data with the published shapes."""
    from stn_fast.data import cifar10, fashion_mnist, ptb
    from stn_fast.recipes import images as recipes

    with (
        mock.patch.object(cifar10, "load", return_value=random_images(3, 32, 3000)),
        mock.patch.object(fashion_mnist, "load", return_value=random_images(1, 28, 3000)),
        mock.patch.dict(recipes.VALID_SIZES, dict.fromkeys(recipes.VALID_SIZES, 500)),
        mock.patch.object(recipes, "SMALL_TRAIN_SIZE", 2000),
        mock.patch.object(ptb, "load", return_value=random_text(20_000)),
    ):
        yield


def short_run(name: str, settings: Sequence[str], steps: int) -> dict[str, Any]:
    """The contents of ``result.json`` after ``steps`` steps of the recipe ``name``."""
    from stn_fast.recipes import recipe
    from stn_fast.training.layering import resolve
    from stn_fast.training.run import run

    module = recipe(name)
    short = (f"schedule.max_steps={steps}", "schedule.epochs=1", "method.warmup_epochs=0")
    with tempfile.TemporaryDirectory() as folder, random_data():
        config = replace(resolve(module.config(), None, [*short, *settings]), run_dir=folder)
        return run(config, module.build, resume=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each recipe; returns how many of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=[*NETWORKS], metavar="RECIPE", help=", ".join(NETWORKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the configuration")
    options = parser.parse_args(arguments)
    for name in options.recipes:
        if name not in NETWORKS:
            raise UserError(f"no recipe '{name}' here: {did_you_mean(name, NETWORKS)}")
    failed = 0
    for name in options.recipes:
        start = time.perf_counter()
        try:
            result = short_run(name, [f"device={options.device}", *options.set], options.steps)
            numbers = (result["valid_loss"], *result["hyperparameters_end"].values())
            problem = "" if all(map(math.isfinite, numbers)) else f"not finite: {numbers}"
            moved = result["hyperparameters_end"] != result["hyperparameters_start"]
            problem = problem or ("" if moved else "no hyperparameter has moved")
            told = f"{result['steps']} steps, validation loss {result['valid_loss']:.3f}"
        except Exception as error:  # each recipe by itself: the others still tell something
            problem, told = f"{type(error).__name__}: {error}", ""
        failed += bool(problem)
        print(f"{name:<22}{'FAILED ' + problem if problem else told}, {time.perf_counter() - start:.1f} s", flush=True)
    if failed:
        print(f"{failed} of {len(options.recipes)} recipes failed", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
