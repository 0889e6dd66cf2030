"""Counts the CUDA launches of a step of each recipe, and measures the host's time; no GPU is needed.

    python -m benchmarks.launches digits cifar10 ptb
    python -m benchmarks.launches --seconds 0 --json benchmarks/results/launches.json

Launches are counted in the third training and the third validation step at the recipe's own sizes, on `dry_device`,
with the autotuner's defaults. The host's time is that of the same steps on CPU tensors, including Triton's launch code
but not the driver, with networks and batches so small that arithmetic hardly matters. These steps alternate with a
training step of the plain network, with torch's layers and dropouts instead of the gated ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import smoke
from benchmarks.dry_device import Recording, Variant, dry_device, recorded_launches
from benchmarks.ratios import write
from stn_fast.command_line import run_command
from stn_fast.conversion import Converted
from stn_fast.conversion.folding import tuned_of
from stn_fast.data import Split, cifar10
from stn_fast.models import LanguageModel
from stn_fast.recipes import recipe
from stn_fast.recipes.images import build_task
from stn_fast.training import finite
from stn_fast.training.build import build_method
from stn_fast.training.config import PRECISIONS, Config, Precision, as_published
from stn_fast.training.methods import SelfTuning
from stn_fast.training.task import Task

RESNET = "cifar10-resnet18"  # no recipe, but the data of one, and those of its hyperparameters that a ResNet has
RECIPES = ("digits", "fashion-mnist-small", "fashion-mnist", "cifar10", RESNET, "ptb-small", "ptb")
_ONLY_ALEXNET = {*(f"conv_dropout_{i}" for i in range(1, 6)), "fc_dropout_1", "fc_dropout_2"}
# Channels and hidden units in the place of the networks' own, where they are constants of a module.
NARROW: dict[str, dict[str, tuple[int, ...]]] = {
    "alexnet": {"CHANNELS": (8,) * 5, "HIDDEN": (16, 16)},
    "fashion_cnn": {"CHANNELS": (4, 4)},
}
WARM_UP = 2  # steps before the one that is recorded: the first makes the optimizers' state


def build(name: str, device: Literal["cpu", "cuda"], narrow: bool = False) -> tuple[Config, Task]:
    """The recipe's configuration and its task, on random data; `narrow`: the same layers with few numbers each."""
    config = replace(recipe("cifar10" if name == RESNET else name).config(), device=device)
    with contextlib.ExitStack() as stack:
        if narrow:
            config = replace(config, schedule=replace(config.schedule, batch_size=2, valid_batch_size=2))
            config = config if config.text is None else replace(config, text=replace(config.text, width=16))
            stack.enter_context(mock.patch.object(smoke, "VOCABULARY", 50))
            for network, constants in NARROW.items():
                found = import_module(f"stn_fast.models.{network}")
                for constant, sizes in constants.items():
                    stack.enter_context(mock.patch.object(found, constant, sizes))
        stack.enter_context(smoke.random_data())
        if name != RESNET:
            return config, recipe(name).build(config)
        used = {name: entry for name, entry in config.hyperparameters.items() if name not in _ONLY_ALEXNET}
        used["last_dropout"] = config.hyperparameters["fc_dropout_1"]
        config = replace(config, hyperparameters=used)
        return config, build_task(config, cifar10.load(), partial(_resnet18, narrow), valid_size=500)


def _resnet18(narrow: bool) -> nn.Module:
    from stn_fast.models import resnet

    stages = (8,) * 4 if narrow else (64, 128, 256, 512)
    return resnet.ResNet(resnet.BasicBlock, stages[0], stages, 2, 3, 10)


def steps(config: Config, task: Task) -> dict[str, Callable[[], object]]:
    """One call a published step, each on the next batch of its split, as the trainer takes it."""
    method = build_method(as_published(config), task)
    assert isinstance(method, SelfTuning)
    device, schedule = method.location.device, config.schedule
    sizes = (schedule.batch_size, schedule.valid_batch_size)

    def endless(split: Split, size: int, stream: int) -> Iterator[Any]:
        batches = task.batching.sequence(split, size, seed=0, stream=stream, device=device)
        return map(batches.__getitem__, count())

    train, valid = (endless(s, size, k) for k, (s, size) in enumerate(zip(task.data[:2], sizes, strict=True)))
    numbers = count()
    return {
        "train": lambda: method.train_step(next(train), next(numbers)),
        "valid": lambda: method.valid_step(next(valid), next(numbers)),
    }


def record(
    name: str,
    capability: tuple[int, int] = (9, 0),
    candidates: bool = False,
    precision: Precision = "fp32",
) -> dict[str, Recording]:
    """What the third training and the third validation step of a recipe launch, by mode.

    Args:
        candidates: launch all that the autotuner would measure; else its default.
        precision: of the products of both steps.
    """
    found = {}
    with dry_device(capability, candidates) as recording:
        config, task = build(name, "cuda")
        for mode, step in steps(replace(config, precision=precision), task).items():
            for _ in range(WARM_UP):
                step()
            recording.clear()
            step()
            found[mode] = copy.deepcopy(recording)
    return found


def variants(
    names: Iterable[str] = RECIPES, capability: tuple[int, int] = (9, 0), candidates: bool = True
) -> list[Variant]:
    """Every distinct specialisation of a kernel that steps of these recipes launch, in every precision."""
    found: dict[Variant, None] = {}
    for name in names:
        for precision in PRECISIONS:
            for recording in record(name, capability, candidates, precision).values():
                found |= dict.fromkeys(recording.triton)
    return list(found)


def as_json(variant: Variant) -> dict[str, Any]:
    """The fields of a variant as JSON has them."""
    types, constants = dict(variant.types), dict(variant.constants)
    return variant.__dict__ | {"types": types, "constants": constants, "divisible": sorted(variant.divisible)}


def plain(model: nn.Module) -> nn.Module:
    """A copy of a converted model, as the plain network with its W and b and with dropout of rate 0.1.

    It drops no words and no weights, so that embedding and LSTM are torch's own.
    """
    model = copy.deepcopy(model)
    rates = dict.fromkeys(tuned_of("plain", model).space.names, 0.1)
    rates |= dict.fromkeys(LanguageModel.RATES.values(), 0.0)
    for module in model.modules():
        if isinstance(module, Converted):
            module.revert(rates)
    del model.tuned_hyperparameters
    return model


def plain_step(config: Config, task: Task) -> Callable[[], object]:
    """A training step of the plain network: forward, backward, clipping and a fused SGD.

    A text has one time step only: cuDNN takes a single call for all of them.
    """
    model = plain(task.model)
    size = config.schedule.batch_size
    batch: Any = Split(*(part[:size] for part in task.data.train))
    if config.text is not None:
        batch = SimpleNamespace(inputs=batch.inputs.view(1, size), targets=batch.targets.view(1, size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = model(batch.inputs)
        logits = outputs.logits.flatten(0, 1) if config.text is not None else outputs
        F.cross_entropy(logits, batch.targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _always(answer: Any) -> Callable[..., Any]:
    """A function, which a mock is too slow for."""
    return lambda *_: answer


@contextlib.contextmanager
def _host_of_cuda() -> Iterator[None]:
    """Steps on CPU tensors that take the host's path of CUDA; what kernels would have written is left to chance."""
    from stn_fast import dispatch
    from stn_fast.kernels.autotune import tuner
    from stn_fast.ops import augment

    known: dict[Any, str] = {}

    def choose(problem: Any, names: Any, run: Any, default: str, device: Any) -> str:
        return known.setdefault((problem, device), default)

    with (
        recorded_launches(lambda _: None),
        mock.patch.object(tuner, "choose", choose),
        mock.patch.object(dispatch, "_automatic", _always("triton")),
        mock.patch.object(dispatch, "_cuda_is_available", _always(True)),
        mock.patch.object(augment, "_check_values", _always(None)),
        mock.patch.object(finite, "_decides", _always(True)),
        mock.patch.object(finite.Guard, "_leave_out", _always(None)),
        mock.patch.object(finite, "math", SimpleNamespace(isfinite=_always(True))),
    ):
        yield


def host_microseconds(name: str, seconds: float) -> dict[str, float]:
    """Microseconds of this thread's processor time for a training, a validation and a plain training step, in turns.

    The first quintile of each: other work on the machine takes caches and half of a core away.
    """
    with _host_of_cuda():
        config, task = build(name, "cpu", narrow=True)
        timed = steps(config, task)
        timed["plain"] = plain_step(config, task)
        taken: dict[str, list[float]] = {mode: [] for mode in timed}
        for _ in range(5):
            for step in timed.values():
                step()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["plain"]) < 5:
            for mode, step in timed.items():
                began = time.thread_time_ns()
                step()
                taken[mode].append((time.thread_time_ns() - began) / 1e3)
    return {mode: statistics.quantiles(times, n=5)[0] for mode, times in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Records and prints; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"from {', '.join(RECIPES)}; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each recipe's host time; 0: don't")
    parser.add_argument("--operators", action="store_true", help="list launches by kernel and operator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument(
        "--variants",
        type=int,
        nargs="+",
        metavar="CAPABILITY",
        help="write nothing but the variants of kernels that steps launch on devices of 80, 90, ..., as JSON",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.recipes) - set(RECIPES):
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    names = options.recipes or RECIPES
    if options.variants:
        found = {number: variants(names, divmod(number, 10)) for number in options.variants}
        listed = [{"capability": number, **as_json(one)} for number, of_one in found.items() for one in of_one]
        print(json.dumps(listed))
        return 0
    rows = []
    print(f"{'recipe':<22}{'step':<7}{'Triton':>7}{'other':>7}{'reads':>7}{'host us':>10}{'plain us':>10}{'ratio':>7}")
    for name in names:
        host = host_microseconds(name, options.seconds) if options.seconds else {}
        for mode, recording in record(name).items():
            row: dict[str, Any] = {"recipe": name, "step": mode, "triton": recording.triton.total()}
            row |= {"other": recording.operators.total(), "reads": recording.reads.total()}
            if host:
                row |= {"host_us": round(host[mode], 1), "plain_us": round(host["plain"], 1)}
            rows.append(row | {"kernels": recording.kernels, "operators": recording.operators})
            times = f"{host[mode]:>10.0f}{host['plain']:>10.0f}{host[mode] / host['plain']:>7.2f}" if host else ""
            print(f"{name:<22}{mode:<7}{row['triton']:>7}{row['other']:>7}{row['reads']:>7}{times}", flush=True)
            if options.operators:
                for launches in (recording.kernels, recording.operators):
                    print("   ", ", ".join(f"{count} {what}" for what, count in launches.most_common()))
    if options.json:
        write(options.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
