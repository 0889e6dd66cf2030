"""What a step costs when two processes share its batch: bytes, seconds, and the ways to average gradients.

    python -m benchmarks.processes --out benchmarks/results/processes-cpu.json

Launches two processes by torchrun, with one thread each, which talk by gloo. For each recipe, three things take turns,
and medians over the repetitions are printed:

one, two   training and validation steps by one process with the whole batch, and by two with half of it each
flat, ddp  a forward and a backward pass of the training loss on half of a batch, with the gradients averaged by one
           all-reduce of all of them, as the trainer does, or by DistributedDataParallel; `local`: not at all
check      the comparison of all numbers that the processes should share, which the trainer makes every 100 steps

Seconds are those of the first process: on the clock, which depends on what else the machine does, and of CPU time, in
which no waiting is. Each row has the machine's load, of which 2 is this command's own.

Bytes are those of the tensors that are reduced. Latency and bandwidth are those of all-reduces of 8 bytes and 16 MB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.ratios import device_name, versions
from benchmarks.self_tuning import writable
from stn_fast.command_line import run_command
from stn_fast.recipes import recipe
from stn_fast.training.batches import Batch, as_batch
from stn_fast.training.build import build_method
from stn_fast.training.distributed import Processes, Shares, launched
from stn_fast.training.methods import SelfTuning

RECIPES = ("digits", "fashion-mnist-small", "ptb-small")
SMALL, LARGE = 1, 2 << 20  # numbers of 8 bytes
MODEL = (2, 4, 8, 16)  # numbers of processes that the model is shown for
CPU = torch.device("cpu")
Turn = Callable[[], object]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, the bytes of each tensor that is reduced are added to the list."""
    reduced: list[int] = []
    reduce: Any = torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        reduced.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **options)

    torch.distributed.all_reduce = counting
    try:
        yield reduced
    finally:
        torch.distributed.all_reduce = reduce


class Steps:
    """A method of a recipe and its batches: this process's share of each, or the whole ones."""

    def __init__(self, name: str, processes: Processes | None) -> None:
        module = recipe(name)
        config = replace(module.config().resolved, threads=1)
        self.task = module.build(config)
        method = build_method(config, self.task)
        assert isinstance(method, SelfTuning)
        self.method, self.config, self.processes = method, config, processes
        schedule, sequence = config.schedule, self.task.batching.sequence
        self.sizes = {"train": schedule.batch_size, "valid": schedule.valid_batch_size}
        self.batches: dict[str, Any] = {
            kind: sequence(split, size, seed=0, stream=stream)
            for stream, ((kind, size), split) in enumerate(zip(self.sizes.items(), self.task.data[:2], strict=True))
        }
        if processes is not None:
            method.share(processes)
            self.batches = {kind: Shares(one, processes, CPU) for kind, one in self.batches.items()}
        self.taken = {"train": 0, "valid": 0}

    def take(self, kind: str) -> None:
        """A training or a validation step on the next batch."""
        batch, size = self.batches[kind][self.taken[kind]], self.sizes[kind]
        first = 0 if self.processes is None else self.processes.share(size).start
        step = self.method.train_step if kind == "train" else self.method.valid_step
        step(batch, sum(self.taken.values()), first_example=first)
        self.taken[kind] += 1


class TrainingLoss(nn.Module):
    """The training loss of a method's model with perturbed hyperparameters, as a module for DistributedDataParallel."""

    def __init__(self, steps: Steps) -> None:
        super().__init__()
        self.model, self.method, self.number = steps.method.model.train(), [steps.method], 0

    def forward(self, batch: Batch) -> Tensor:
        (method,) = self.method  # not a submodule
        self.number += 1
        draw = dict(batch_size=batch.examples, seed=0, step=self.number, first_example=0)
        with torch.no_grad():
            hyper = method._perturbed(draw)
        with method._in_use(hyper):
            loss: Tensor = batch.finish(method.training_objective(self.model, batch, hyper))
            return loss


def ways_to_average(name: str, processes: Processes) -> dict[str, Turn]:
    """Forward and backward passes, with the gradients averaged each way; each has a network of its own."""

    def passes(way: str) -> Turn:
        steps = Steps(name, None)
        processes.align(steps.method.model)
        batch = as_batch(steps.batches["train"][0], CPU)
        own: Any = batch.part(processes.share(batch.examples))  # type: ignore[attr-defined]
        loss = TrainingLoss(steps)
        wrapped: Any = nn.parallel.DistributedDataParallel(loss) if way == "ddp" else loss
        parameters = list(steps.method.model.parameters())

        def turn() -> None:
            for parameter in parameters:
                parameter.grad = None
            found = wrapped(own.like(own.parts()))
            found.backward()
            if way == "flat":
                gradients = [one.grad for one in parameters if one.grad is not None]
                processes.average_([*gradients, found.detach().clone()], own.examples)

        return turn

    return {way: passes(way) for way in ("local", "flat", "ddp")}


class Seconds(NamedTuple):
    """Of a step: on the clock, and of the CPU time of this process, which has no waiting in it."""

    wall: float
    cpu: float


def seconds_of(turn: Turn, steps: int) -> Seconds:
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        turn()
    return Seconds((time.perf_counter() - began) / steps, (time.process_time() - cpu_began) / steps)


def medians(
    turns: dict[str, Turn], alone: Sequence[str], steps: int, repetitions: int, processes: Processes
) -> dict[str, Seconds]:
    """Median seconds of each, which take turns. Those in ``alone`` run in the first process while the other waits."""
    found: dict[str, list[Seconds]] = {name: [] for name in turns}
    for repetition in range(repetitions + 1):
        for name, turn in turns.items():
            torch.distributed.barrier(group=processes.group)
            if name not in alone or processes.rank == 0:
                found[name].append(seconds_of(turn, 1 if repetition == 0 else steps))
    return {name: Seconds(*map(statistics.median, zip(*one[1:], strict=True))) for name, one in found.items() if one}


def link(processes: Processes, repetitions: int) -> dict[str, Any]:
    """Latency and bandwidth of all-reduces by two processes."""

    def reduces(numbers: int) -> Turn:
        tensor = torch.zeros(numbers, dtype=torch.float64)
        return lambda: torch.distributed.all_reduce(tensor, group=processes.group)

    turns = {"small": reduces(SMALL), "large": reduces(LARGE)}
    found = medians(turns, (), 5, repetitions, processes)
    latency = found["small"].wall
    seconds = max(found["large"].wall - latency, 1e-9)
    # Each of k processes sends and receives 2 (k − 1) / k times the bytes.
    share = 2 * (processes.size - 1) / processes.size
    return {"recipe": None, "latency_seconds": latency, "bytes_per_second": share * 8 * LARGE / seconds}


def measured(name: str, processes: Processes, steps: int, repetitions: int) -> dict[str, Any]:
    """The row of a recipe."""
    one, two = Steps(name, None), Steps(name, processes)
    row: dict[str, Any] = {"recipe": name, "batch_sizes": two.sizes}
    row["parameters"] = sum(parameter.numel() for parameter in two.method.model.parameters())
    for kind in ("train", "valid"):
        two.take(kind)
        with counted() as reduced:
            two.take(kind)
        row |= {f"{kind}_bytes": sum(reduced), f"{kind}_reductions": len(reduced)}
        turns: dict[str, Turn] = {
            "one": lambda kind=kind: one.take(kind),  # type: ignore[misc]
            "two": lambda kind=kind: two.take(kind),  # type: ignore[misc]
        }
        found = medians(turns, ["one"], steps, repetitions, processes)
        if processes.rank == 0:
            for count in ("one", "two"):
                row |= {f"{kind}_seconds_{count}": found[count].wall, f"{kind}_cpu_seconds_{count}": found[count].cpu}
            row[f"{kind}_two_to_one"] = found["two"].wall / found["one"].wall
            row[f"{kind}_cpu_two_to_one"] = found["two"].cpu / found["one"].cpu
    with counted() as reduced:
        two.method.check_equal(0)
    row["check_bytes"] = sum(reduced)
    turns = ways_to_average(name, processes) | {"check": lambda: two.method.check_equal(0)}
    found = medians(turns, (), steps, repetitions, processes)
    for way, seconds in found.items():
        row |= {f"{way}_seconds": seconds.wall, f"{way}_cpu_seconds": seconds.cpu}
    row["ddp_to_flat"] = found["ddp"].wall / found["flat"].wall
    row["ddp_to_flat_cpu"] = found["ddp"].cpu / found["flat"].cpu
    return row


def predicted(row: dict[str, Any], kind: str, processes: int, link: dict[str, Any]) -> float:
    """The model: seconds of a step by ``processes``, from those of one, the latency and the bandwidth."""
    sent = 2 * (processes - 1) / processes * row[f"{kind}_bytes"]
    waits = row[f"{kind}_reductions"] * link["latency_seconds"] if processes > 1 else 0.0
    return float(row[f"{kind}_seconds_one"] / processes + waits + sent / link["bytes_per_second"])


def shown(rows: Sequence[dict[str, Any]]) -> str:
    of_link, *of_recipes = rows
    latency, bandwidth = 1e6 * of_link["latency_seconds"], of_link["bytes_per_second"] / 1e9
    lines = [f"all-reduce by two processes: latency {latency:.0f} µs, bandwidth {bandwidth:.2f} GB/s"]
    for row in of_recipes:
        lines.append(f"{row['recipe']}: {row['parameters']:,} parameters")
        for kind in ("train", "valid"):
            one, two = (1e3 * row[f"{kind}_seconds_{count}"] for count in ("one", "two"))
            model = 1e3 * predicted(row, kind, 2, of_link)
            lines.append(
                f"  {kind} step: {row[f'{kind}_bytes']:,} bytes in {row[f'{kind}_reductions']} reductions; "
                f"{one:.2f} ms by one process, {two:.2f} ms by two (ratio {two / one:.2f}, of CPU "
                f"time {row[f'{kind}_cpu_two_to_one']:.2f}; model {model:.2f} ms)"
            )
        relative = {count: predicted(row, "train", count, of_link) / row["train_seconds_one"] for count in MODEL}
        listed = ", ".join(f"{count}: {value:.2f}" for count, value in relative.items())
        lines.append(f"  model of a training step, by number of processes, in units of that of one: {listed}")
        ways = ", ".join(f"{way} {1e3 * row[f'{way}_seconds']:.2f} ms" for way in ("local", "flat", "ddp", "check"))
        lines.append(f"  {ways}; ddp to flat {row['ddp_to_flat']:.2f}, of CPU time {row['ddp_to_flat_cpu']:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="recipes that tune by stn or delta-stn")
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn")
    parser.add_argument("--repetitions", type=int, default=9, help="turns of each")
    parser.add_argument("--out", help="JSON file of the rows")
    options = parser.parse_args(arguments)
    out = None if options.out is None else writable(options.out, "--out")
    if "WORLD_SIZE" not in os.environ:
        given = sys.argv[1:] if arguments is None else list(arguments)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, "-m", "benchmarks.processes", *given], env=environment).returncode
    torch.set_num_threads(1)
    with launched("cpu") as processes:
        if processes is None:
            parser.error("needs two processes or more: run it by itself, or by torchrun with --nproc-per-node=2")
        rows = [link(processes, options.repetitions)]
        rows += [measured(name, processes, options.steps, options.repetitions) for name in options.recipes]
        about = {"processes": processes.size, "device": device_name(CPU), "versions": versions()}
        about["load"] = os.getloadavg()[0]
        if processes.rank == 0:
            print(shown(rows))
            if out is not None:
                out.write_text(json.dumps([row | about for row in rows], indent=1) + "\n")
        torch.distributed.barrier(group=processes.group)
        gc.collect()  # a group that is still held when Python ends has threads that abort it
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
