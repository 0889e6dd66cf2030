"""Whole steps of the self-tuning AlexNet on CIFAR-sized images, against plain training and the published steps.

    python -m benchmarks.steps --json benchmarks/results/steps-cpu.json
    python -m benchmarks.steps --device cuda --precision bf16 --modes cycle

A step is perturbation, forward, backward, clipping and optimizer: `train`, `valid` and `cycle` (two training steps and
a validation step) on floats, `train_with_data` from uint8 images, which the published code augments one by one. All
take turns in one process; ratios below 1 are faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain, published, whole_steps
from benchmarks.augmentation import MEAN, STD
from benchmarks.baselines import Range
from benchmarks.timing import Clock, Provider
from benchmarks.whole_steps import Makers, steps_of
from stn_fast.command_line import run_command
from stn_fast.hyperparameter import ResponseRank
from stn_fast.training.capture import CapturedSteps
from stn_fast.training.config import Precision
from stn_fast.training.methods import Method

MODES = ("train", "valid", "cycle", "train_with_data")
PROVIDERS = ("stn_fast", "stn_fast_captured", *whole_steps.RANKS, "fixed", "plain", "plain_captured", "published")
CLIP = 1.0


def makers(mode: str, batch: int, device: torch.device, precision: Precision, graphs: plain.Graphs | None) -> Makers:
    """The package's step, plain training and the published step, each on its own copy of the network.

    With ``graphs``, the first two also captured.
    """
    from stn_fast.models import ImageClassifier, alexnet, tuned
    from stn_fast.models.classifier import channels_last
    from stn_fast.recipes import recipe
    from stn_fast.training import task
    from stn_fast.training.methods import default_optimizer
    from stn_fast.training.spaces import build_space

    torch.manual_seed(0)
    space = build_space(recipe("cifar10").config())
    with_data = mode == "train_with_data"
    images = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)
    targets = torch.randint(10, (batch,)).to(device)
    images = images.to(device) if with_data else channels_last(torch.randn(images.shape)).to(device)
    # The published steps perturb, augment and read images as their authors' code does.
    contiguous = images.contiguous()

    def method(rank: ResponseRank = None, make: Callable[..., Any] = whole_steps.self_tuning) -> Any:
        torch.manual_seed(0)
        network = alexnet()
        model = ImageClassifier(space, network, mean=MEAN, std=STD, image_size=32) if with_data else network
        losses = task.classification_loss, task.classification_loss
        # Without the data the augmentation is left out, and its strengths regulate nothing.
        options = dict(seed=0, clip=CLIP, allow_unused=not with_data)
        return make(tuned(model, space, rank).to(device), space, losses, precision, **options)

    def stn_fast(of: Method | CapturedSteps, tunes: bool = True) -> Provider:
        count = iter(range(10**9))
        pair: tuple[Tensor, Tensor] = images, targets
        train, valid = (lambda: of.train_step(pair, next(count))), (lambda: of.valid_step(pair, next(count)))
        return steps_of(mode, train, valid if tunes else None, getattr(of, "reasons", None))

    def training() -> plain.Training:
        torch.manual_seed(0)
        model = plain.alexnet().to(device)
        return plain.Training(model, default_optimizer, CLIP, whole_steps.casting(precision, device))

    def taking(step: whole_steps.PlainStep, why_eager: Sequence[str] | None = None) -> Provider:
        return steps_of(mode, lambda: step(images, targets), None, why_eager)

    def of_paper() -> Provider:
        ranges = [Range(h.low, h.high, h.integer) for h in space]
        theirs = published.Trainer(space.names, ranges, *space.initial_state(device))
        cast = whole_steps.casting(precision, device)
        return steps_of(
            mode,
            lambda: theirs.train_step(contiguous, targets, cast),
            lambda: theirs.valid_step(contiguous, targets, cast),
        )

    found: Makers = {
        "stn_fast": lambda: stn_fast(method()),
        **{name: partial(lambda rank: stn_fast(method(rank)), rank) for name, rank in whole_steps.RANKS.items()},
        "fixed": lambda: stn_fast(method(make=whole_steps.fixed), tunes=False),
        "published": of_paper,
    }
    if graphs is not None:
        found = {**found, "stn_fast_captured": lambda: stn_fast(method().captured())}
    if not with_data:
        found = {**found, "plain": lambda: taking(training().step)}
    if graphs is not None and not with_data:
        maker = graphs
        found = {**found, "plain_captured": lambda: taking(training().captured(maker, images, targets), ())}
    return found


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None, graphs: plain.Graphs | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    whole_steps.add_options(parser, MODES, PROVIDERS)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[str, str, Sequence[int], Makers]]:
        device, maker = torch.device(options.device), graphs or whole_steps.graphs_of(options.device)
        for mode in options.modes:
            yield (
                "alexnet",
                mode,
                (options.batch, 3, 32, 32),
                makers(mode, options.batch, device, options.precision, maker),
            )

    return whole_steps.measure("alexnet_step", cases(), options, clock)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
