"""What the commands for whole steps share: modes, precision, rows, and turns of everyone who takes part.

A step is what a user waits for, host included. `fixed` is the package's own training with fixed hyperparameters,
`plain` trains the network without regularisers, and `stn_fast_rank16` and similar names have a low-rank response. In
mode `cycle` a self-tuning provider takes two training steps and one validation step with a batch of the same size,
and a plain one takes two training steps: the ratio of the two is what a 2:1 cycle costs in units of plain training.
In the other modes one step is compared with one plain step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain
from benchmarks.cuda_timing import Cuda
from benchmarks.ratios import Row, device_name, ratio, times, versions, without_cuda, write
from benchmarks.timing import Clock, Provider, Timings, interleave, peak_bytes
from stn_fast.hyperparameter import ResponseRank
from stn_fast.training.config import Precision
from stn_fast.training.methods import FixedHyperparameters, SelfTuning
from stn_fast.training.precision import float32_products

# Providers of the package's step with responses of these ranks.
RANKS: dict[str, ResponseRank] = {
    "stn_fast_rank4": 4, "stn_fast_rank16": 16, "stn_fast_rank64": 64, "stn_fast_auto": "auto",
}  # fmt: skip
PRECISIONS: dict[Precision, str] = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16"}
TRAIN_STEPS, VALID_STEPS = 2, 1

Step = Callable[[], object]
TakeStep = Callable[[Any, int], object]
PlainStep = Callable[[Tensor, Tensor], object]
# Makes the providers of a mode, each when it is asked for: {name: function}.
Makers = Mapping[str, Callable[[], Provider]]


def casting(precision: Precision, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context of a forward pass: autocast to bfloat16, or none."""
    if precision != "bf16":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def self_tuning(
    model: nn.Module, space: Any, losses: Sequence[Any], precision: Precision, **options: Any
) -> SelfTuning:
    """The package's method with published steps; ``losses`` are the training and the validation objective."""
    training, validation = losses
    return SelfTuning(model, space, training, validation, precision=precision, antithetic=False, **options)


def fixed(
    model: nn.Module, space: Any, losses: Sequence[Any], precision: Precision, **options: Any
) -> FixedHyperparameters:
    """Training of the same network through the same code, at hyperparameters that nothing perturbs or tunes."""
    return FixedHyperparameters(model, space, losses[0], precision=precision, **options)


def graphs_of(device: str) -> plain.Graphs | None:
    """What makes CUDA graphs on this device; None on the CPU, or without CUDA."""
    return Cuda(torch.device(device)) if device == "cuda" and torch.cuda.is_available() else None


def steps_of(mode: str, train: Step, valid: Step | None, why_eager: Sequence[str] | None = None) -> Provider:
    """A turn of a mode; without ``valid``, of plain training. ``why_eager`` is what a captured provider collects."""
    if valid is None:
        calls = [train] * (TRAIN_STEPS if mode == "cycle" else 1)
    elif mode == "cycle":
        calls = [train] * TRAIN_STEPS + [valid] * VALID_STEPS
    else:
        calls = [valid if mode == "valid" else train]

    def call(_: None) -> None:
        for step in calls:
            step()

    return Provider(call, whole_step=True, why_eager=None if why_eager is None else lambda: why_eager)


def plain_of(name: str) -> str:
    """The plain provider that one is compared with: the captured one where it is itself captured."""
    return "plain_captured" if name.endswith("_captured") else "plain"


def rows_of(
    op: str,
    mode: str,
    shape: Sequence[int],
    precision: Precision,
    providers: Mapping[str, Provider],
    timings: Timings,
    device: torch.device,
    also_to: Sequence[str] = (),
) -> list[Row]:
    """One row for every provider, as `benchmarks.ratios` writes them; the published step is the eager one.

    Each has a ratio to each provider of ``also_to`` too.
    """
    return [
        {"op": op, "mode": mode, "shape": list(shape), "dtype": PRECISIONS[precision], "precision": precision}
        | {"provider": name}
        | times(name, timings)
        | {
            "captured": None if (why := providers[name].why_eager) is None else not why(),
            "ratio_to_limit": None,
            "ratio_to_eager": ratio(timings, name, "published"),
            "ratio_to_plain": ratio(timings, name, plain_of(name)),
            "ratio_to_fixed": ratio(timings, name, "fixed"),
            **{f"ratio_to_{other}": ratio(timings, name, other) for other in also_to},
            # A graph's memory is set aside when it is captured.
            "peak_bytes": None if name.endswith("_captured") else peak_bytes(providers[name], device),
            "device": device_name(device),
            "versions": versions(),
        }
        for name in timings.names
    ]


def add_options(parser: argparse.ArgumentParser, modes: Sequence[str], providers: Sequence[str]) -> None:
    """The flags that both commands have."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument(
        "--providers", nargs="+", choices=providers,
        help="default: all except ranks and fixed, and on CUDA except published, which takes long",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30.0, help="time for each mode, warm-up not counted")
    parser.add_argument("--rounds", type=int, default=15, help="at least so many rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")


def measure(
    op: str,
    cases: Iterator[tuple[str, str, Sequence[int], Makers]],
    options: argparse.Namespace,
    clock: Clock | None,
    also_to: Sequence[str] = (),
) -> int:
    """Times and prints one case after the other, (title, mode, shape, makers); returns the exit status."""
    if (wrong := without_cuda(options.device)) is not None:
        print(wrong, file=sys.stderr)
        return 2
    with float32_products(options.precision):
        return _measure(op, cases, options, clock, also_to)


def _measure(
    op: str,
    cases: Iterator[tuple[str, str, Sequence[int], Makers]],
    options: argparse.Namespace,
    clock: Clock | None,
    also_to: Sequence[str],
) -> int:
    device = torch.device(options.device)
    print(f"{device_name(device)}; {options.precision}")
    rows: list[Row] = []
    failed = 0
    for title, mode, shape, makers in cases:
        left_out = {*RANKS, "fixed", *(() if device.type == "cpu" else ("published",))}
        asked = options.providers or [name for name in makers if name not in left_out]
        providers: dict[str, Provider] = {}
        for name in asked:
            if name in makers:
                try:
                    providers[name] = makers[name]()
                except Exception as error:  # such as a capture that fails: the others keep their rows
                    print(f"{title} {mode} {name} failed: {type(error).__name__}: {error}", flush=True)
                    failed += 1
        timings = interleave(providers, device, options.seconds, options.rounds, clock=clock)
        found = rows_of(op, mode, shape, options.precision, providers, timings, device, also_to)
        rows += found
        failed += len(timings.failed)
        print_steps(title, mode, found, providers, timings, also_to)
        if options.json and found:
            write(options.json, rows)
    return 1 if failed else 0


def print_steps(
    title: str,
    mode: str,
    rows: Sequence[Row],
    providers: Mapping[str, Provider],
    timings: Timings,
    also_to: Sequence[str] = (),
) -> None:
    """A line for every provider, and one for each reason why a captured one was not."""
    for row in rows:
        compared = [
            f"ratio to {of} {row[key]:.3f}"
            for of, key in (
                ("plain", "ratio_to_plain"),
                ("fixed", "ratio_to_fixed"),
                ("published", "ratio_to_eager"),
                *((other, f"ratio_to_{other}") for other in also_to),
            )
            if row[key] is not None and of != row["provider"].removesuffix("_captured")
        ]
        host = "" if row["host_us"] is None else f"   host {row['host_us'] / 1e3:8.2f} ms"
        print(
            f"{title:<10} {mode:<16} {row['provider']:<18} {row['p50'] / 1e3:9.2f} ms{host}   " + "   ".join(compared)
        )
    for name, provider in providers.items():
        for reason in provider.why_eager() if provider.why_eager else ():
            print(f"{title:<10} {mode:<16} {name:<18} not captured: {reason}")
    for name, error in timings.failed.items():
        print(f"{title:<10} {mode:<16} {name:<18} failed: {error}")
    sys.stdout.flush()
