"""How long a training loop is held up by a checkpoint: written by the loop itself, and by a thread from a copy.

    python -m benchmarks.saving --out benchmarks/results/saving-cpu.json

Both ways write the same state to the same disk, in turns. With the thread, training steps of the recipe `digits` go on
beside the write. They are slower there, because they share processors and Python's lock with it. Per size of the state,
medians over the turns:

written    milliseconds in which the loop writes a checkpoint itself
held       milliseconds in which the loop is held up to copy the state, with the thread
ratio      held / written
beside     milliseconds from then until the checkpoint is on the disk
slowdown   a step beside the write / a step alone
cost       (held + how much longer the steps beside the write took than as many alone) / written

Rows also have the machine's load average before the measurement: other programs make what runs beside the steps dearer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import write
from stn_fast.command_line import run_command
from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.build import build_method
from stn_fast.training.run import using_threads, versions
from stn_fast.training.saving import Saving

Row = dict[str, Any]
COLUMNS = ("megabytes", "written", "held", "ratio", "beside", "slowdown", "cost")
LAYER = 250_000  # numbers in a tensor of the state, which are a megabyte
ALONE = 20  # steps in a turn that are timed without a write


def state_of(megabytes: int) -> dict[str, Any]:
    """A state of this size, like that of a network and its optimizer."""
    return {"model": {f"layer_{number}": torch.randn(LAYER) for number in range(megabytes)}, "step": 0}


def training_step() -> Callable[[], None]:
    """A training step of `digits`, one after the other."""
    config = digits.config()
    task = digits.build(config)
    method, device = build_method(config, task), torch.device("cpu")
    batches = task.batching.sequence(task.data.train, config.schedule.batch_size, seed=0, stream=0, device=device)
    numbers = count()

    def step() -> None:
        number = next(numbers)
        method.train_step(batches[number], number, first_example=0)

    return step


def milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def turn(root: Path, number: int, state: dict[str, Any], step: Callable[[], None], saving: Saving) -> Row:
    """One checkpoint in each way, numbered from ``number``, and the steps alone and beside it."""
    written = milliseconds(lambda: checkpoint.write(root, number, state, number))
    alone = statistics.median(milliseconds(step) for _ in range(ALONE))
    save = partial(checkpoint.write_encoded, root, number + 1, number + 1, 2)
    held = milliseconds(lambda: saving.begin(state, save))
    beside: list[float] = []
    while saving.running:
        beside.append(milliseconds(step))
    saving.wait()
    excess = sum(beside) - alone * len(beside)
    slowdown = statistics.median(beside) / alone if beside else None
    return {
        "written": written,
        "held": held,
        "ratio": held / written,
        "beside": sum(beside),
        "slowdown": slowdown,
        "cost": (held + max(0.0, excess)) / written,
    }


def measured(megabytes: int, root: Path, turns: int, step: Callable[[], None]) -> Row:
    """The medians over the turns, after one that is not counted."""
    state, found = state_of(megabytes), []
    with Saving() as saving:
        for number in range(turns + 1):
            found.append(turn(root, 2 * number + 1, state, step, saving))
    row: Row = {"megabytes": megabytes}
    for name in COLUMNS[1:]:
        values = [one[name] for one in found[1:] if one[name] is not None]
        row[name] = round(statistics.median(values), 4) if values else None
    return row


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with a heading."""
    lines = [" ".join(f"{name:>10}" for name in COLUMNS)]
    for row in rows:
        cells = ("-" if row[name] is None else f"{row[name]:.4g}" for name in COLUMNS)
        lines.append(" ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saving", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[1, 30, 300], metavar="N", help="sizes of the state"
    )
    parser.add_argument("--turns", type=int, default=7, metavar="N", help="checkpoints in each way (default: 7)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="the disk to write to (default: that of $TMPDIR)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows here")
    flags = parser.parse_args(arguments)
    if min(*flags.megabytes, flags.turns) < 1:
        raise UserError(f"--megabytes and --turns must be at least 1, got {flags.megabytes} and {flags.turns}")
    rows = []
    with using_threads(digits.config().threads), tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        step = training_step()
        for megabytes in flags.megabytes:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            about = {"turns": flags.turns, "load": load, "processors": os.cpu_count(), "versions": versions("cpu")}
            rows.append(measured(megabytes, Path(folder) / str(megabytes), flags.turns, step) | about)
    print(table(rows))
    if flags.out is not None:
        write(flags.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
