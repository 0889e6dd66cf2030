"""Whole steps of the self-tuning LSTM language model, against the published ones in eager torch.

    python -m benchmarks.language_steps --json benchmarks/results/language-steps-cpu.json

A step is perturbation, forward, backward, clipping and optimizer, with the state carried from window to window. Both
sides take turns in one process; ratios below 1 are faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines import Range
from benchmarks.published_language import Trainer
from benchmarks.ratios import Row, device_name, write
from benchmarks.steps import rows_of
from benchmarks.timing import Provider, interleave
from stn_fast.command_line import run_command

MODES = ("train", "valid")
LAYERS = 2
# T words of B streams, H units, and the vocabulary: the recipes ptb and ptb-small.
SHAPES = {"ptb": (70, 40, 650, 10_000), "ptb-small": (35, 20, 200, 3_141)}


def steps(mode: str, shape: Sequence[int]) -> dict[str, Provider]:
    """The package's step and the published one, each on a copy of the network of its own, on one random text."""
    from stn_fast.data.text import predictions
    from stn_fast.models import LanguageModel
    from stn_fast.recipes import recipe
    from stn_fast.training import language
    from stn_fast.training.methods import SelfTuning
    from stn_fast.training.spaces import build_space
    from stn_fast.training.streams import Streams

    torch.manual_seed(0)
    window, batch, width, words = shape
    space = build_space(recipe("ptb").config())
    text = Streams(predictions(torch.randint(words, (8 * window * batch,)), 0), batch, window, seed=0, stream=0)
    method = SelfTuning(
        LanguageModel(space, words, width, width, LAYERS),
        space,
        language.regularised_next_word_loss,
        language.next_word_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1, fused=True),
        tune_scales=False,
        clip=0.25,
    )
    theirs = Trainer(
        space.names,
        [Range(h.low, h.high, h.integer) for h in space],
        [not h.per_example for h in space],
        *space.initial_state(),
        words=words,
        width=width,
        layers=LAYERS,
        batch=batch,
    )
    ours, count, fixed = getattr(method, f"{mode}_step"), iter(range(10**9)), text[0]
    other = getattr(theirs, f"{mode}_step")

    def step(_: None) -> object:
        number = next(count)
        return ours(text[number], number)

    return {"stn_fast": Provider(step), "published": Provider(lambda _: other(fixed.inputs, fixed.targets))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_steps", description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each mode, warm-up not counted")
    parser.add_argument("--rounds", type=int, default=15, help="at least so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    print(device_name(device))
    rows: list[Row] = []
    for size in options.sizes:
        shape = SHAPES[size]
        for mode in options.modes:
            providers = steps(mode, shape)
            timings = interleave(providers, device, options.seconds, options.rounds)
            rows += rows_of("language_step", mode, shape, providers, timings, device)
            ours, theirs = (timings.percentile(name, 50) / 1e3 for name in providers)
            ratio = timings.ratio("stn_fast", "published")
            print(
                f"{size:<10} {mode:<6} stn_fast {ours:8.1f} ms   published {theirs:8.1f} ms   ratio {ratio:.3f}",
                flush=True,
            )
            if options.json:
                write(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
