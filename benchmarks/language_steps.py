"""Whole steps of the self-tuning LSTM language model, against plain training and the published steps.

    python -m benchmarks.language_steps --json benchmarks/results/language-steps-cpu.json
    python -m benchmarks.language_steps --device cuda --precision bf16 --modes cycle --sizes ptb

A step is perturbation, forward, backward, clipping and optimizer, with the state carried from window to window; `cycle`
is two training steps and a validation step on as many streams. All take turns in one process; ratios below 1 are
faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import plain, whole_steps
from benchmarks.baselines import Range
from benchmarks.published_language import Trainer
from benchmarks.timing import Clock, Provider
from benchmarks.whole_steps import Makers, steps_of
from stn_fast.command_line import run_command
from stn_fast.hyperparameter import ResponseRank
from stn_fast.training.capture import CapturedSteps
from stn_fast.training.config import Precision
from stn_fast.training.methods import Method

MODES = ("train", "valid", "cycle")
PROVIDERS = ("stn_fast", "stn_fast_captured", *whole_steps.RANKS, "fixed", "plain", "plain_captured", "published")
LAYERS = 2
CLIP = 0.25
# T words of B streams, H units, and the vocabulary: the recipes ptb and ptb-small.
SHAPES = {"ptb": (70, 40, 650, 10_000), "ptb-small": (35, 20, 200, 3_141)}
# Of a pass, as many as Penn Treebank's: the first of each has no state, and is no step like the others.
WINDOWS = 331

self_tuning = partial(whole_steps.self_tuning, tune_scales=False)
sgd = partial(torch.optim.SGD, lr=0.1, fused=True)


def makers(
    mode: str, shape: Sequence[int], device: torch.device, precision: Precision, graphs: plain.Graphs | None
) -> Makers:
    """The package's step, plain training and the published step, each on a copy of the network, on one random text.

    With ``graphs``, the first two also captured.
    """
    from stn_fast.data import Split
    from stn_fast.data.text import predictions
    from stn_fast.models import LanguageModel, tuned
    from stn_fast.recipes import recipe
    from stn_fast.training import language
    from stn_fast.training.spaces import build_space
    from stn_fast.training.streams import Streams

    torch.manual_seed(0)
    window, batch, width, words = shape
    space = build_space(recipe("ptb").config())
    text = predictions(torch.randint(words, (WINDOWS * window * batch + 1,)), 0)
    text = Split(*(part.to(device) for part in text))

    def streams(number: int) -> Streams:
        return Streams(text, batch, window, seed=0, stream=number)

    fixed = streams(0)[0]

    def method(rank: ResponseRank = None, make: Callable[..., Any] = self_tuning) -> Any:
        torch.manual_seed(0)
        model = tuned(LanguageModel(words, width, width, LAYERS), space, rank)
        losses = language.regularised_next_word_loss, language.next_word_loss
        return make(model.to(device), space, losses, precision, optimizer=sgd, clip=CLIP)

    def stn_fast(of: Method | CapturedSteps, tunes: bool = True) -> Provider:
        count, (to_train, to_valid) = iter(range(10**9)), ((streams(k), iter(range(10**9))) for k in range(2))

        def step(take: whole_steps.TakeStep, read: Streams, windows: Iterator[int]) -> object:
            return take(read[next(windows)], next(count))

        train, valid = (lambda: step(of.train_step, *to_train)), (lambda: step(of.valid_step, *to_valid))
        return steps_of(mode, train, valid if tunes else None, getattr(of, "reasons", None))

    def training() -> plain.Training:
        torch.manual_seed(0)
        model = plain.LanguageModel(words, width, LAYERS, batch).to(device)
        return plain.Training(model, sgd, CLIP, whole_steps.casting(precision, device))

    def reading(step: whole_steps.PlainStep, why_eager: Sequence[str] | None = None) -> Provider:
        read, windows = streams(0), iter(range(10**9))

        def next_step() -> object:
            it = read[next(windows)]
            return step(it.inputs, it.targets)

        return steps_of(mode, next_step, None, why_eager)

    def of_paper() -> Provider:
        theirs = Trainer(
            space.names,
            [Range(h.low, h.high, h.integer) for h in space],
            [not h.per_example for h in space],
            *space.initial_state(device),
            words=words,
            width=width,
            layers=LAYERS,
            batch=batch,
        )
        cast = whole_steps.casting(precision, device)
        return steps_of(
            mode,
            lambda: theirs.train_step(fixed.inputs, fixed.targets, cast),
            lambda: theirs.valid_step(fixed.inputs, fixed.targets, cast),
        )

    found: Makers = {
        "stn_fast": lambda: stn_fast(method()),
        **{name: partial(lambda rank: stn_fast(method(rank)), rank) for name, rank in whole_steps.RANKS.items()},
        "fixed": lambda: stn_fast(method(make=whole_steps.fixed), tunes=False),
        "published": of_paper,
        "plain": lambda: reading(training().step),
    }
    if graphs is None:
        return found
    return {
        **found,
        "stn_fast_captured": lambda: stn_fast(method().captured()),
        "plain_captured": lambda: reading(training().captured(graphs, fixed.inputs, fixed.targets), ()),
    }


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None, graphs: plain.Graphs | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_steps", description=__doc__.splitlines()[0])
    whole_steps.add_options(parser, MODES, PROVIDERS)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[str, str, Sequence[int], Makers]]:
        device, maker = torch.device(options.device), graphs or whole_steps.graphs_of(options.device)
        for size in options.sizes:
            for mode in options.modes:
                yield size, mode, SHAPES[size], makers(mode, SHAPES[size], device, options.precision, maker)

    return whole_steps.measure("language_step", cases(), options, clock)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
