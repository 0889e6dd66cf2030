"""Kills runs with SIGKILL, resumes them by the same command line, and compares them with runs that nothing disturbed.

    python tests/faults/kills.py --recipes digits fashion-mnist-small ptb-small --kills 20
    python tests/faults/kills.py --recipes digits --kills 200

Half of the kills come at a random moment of the run, uniform over the time that the undisturbed run takes. The others
come at a random one of its calls that change the disk: before or after a directory is made or a file renamed or synced,
or when a file is half written. A run that ends before its kill is compared and another one is begun, until there were
as many kills as asked for; the last run is then left to end. A run that finds a checkpoint must begin at the newest
one. Compared are, bit for bit: every tensor and number of the
last checkpoint and of the best one (weights, hyperparameters, scales, states of optimizers, positions in the data),
metrics.jsonl and result.json, but for times. Prints the kills that each recipe has survived; the exit status is 1 if
there is a difference.

Runs are forked from this process, which has imported torch but has computed nothing and has one thread, and draw no
picture at their end; with --whole-processes, each one is a process of its own, ``python -m stn_fast.train``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]

# So short that a kill costs a second or two, with every part of a run: warm-up, validation steps, several checkpoints.
SETTINGS = {
    "digits": ("schedule.epochs=5", "method.warmup_epochs=1", "schedule.checkpoint_epochs=1"),
    "fashion-mnist-small": (
        *("train_fraction=0.05", "schedule.epochs=2", "schedule.batch_size=25", "schedule.valid_batch_size=25"),
        *("method.warmup_epochs=1", "schedule.checkpoint_epochs=1", "threads=1"),
    ),
    "ptb-small": (
        *("train_fraction=0.05", "schedule.epochs=2", "text.window=20", "text.width=32", "schedule.batch_size=40"),
        *("text.valid_streams=50", "text.test_streams=50", "method.warmup_epochs=1", "threads=1"),
        *("schedule.checkpoint_epochs=1",),
    ),
}
# What may differ between the states of two runs.
TIMES = ("wall_seconds", "cpu_seconds", "reported_at", "step_clock")


class Ended(NamedTuple):
    """How a process ended: its exit status, negative for a signal, and what it has printed."""

    status: int
    said: str


def command(recipe: str, method: str, folder: Path, extra: Sequence[str] = ()) -> list[str]:
    """The arguments of the command line, always the same for one folder."""
    pairs = [part for pair in (*SETTINGS[recipe], *extra) for part in ("--set", pair)]
    return [recipe, "--method", method, "--run-dir", str(folder), *pairs]


def die_at(call: int, counted: Path | None = None) -> None:
    """From now on, this process kills itself at its ``call``-th change of the disk; -1 counts them into a file."""
    from stn_fast import files
    from stn_fast.training import checkpoint

    changes = 0

    def change() -> bool:
        nonlocal changes
        changes += 1
        if counted is not None:
            counted.write_bytes(b"%d" % changes)
        return changes == call

    def around(function: Any) -> Any:
        def changing(*given: Any, **options: Any) -> Any:
            if change():
                die()
            found = function(*given, **options)
            if change():
                die()
            return found

        return changing

    def half_written(path: Path, *parts: Any) -> None:
        if change():
            with path.open("wb") as file:
                for part in parts[: len(parts) // 2]:
                    file.write(part)
                file.write(bytes(memoryview(parts[len(parts) // 2]))[:7])
            die()
        write_through(path, *parts)

    write_through = files.write_through
    files.write_through = checkpoint.write_through = half_written
    for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "replace"), (os, "fsync")):
        setattr(owner, name, around(getattr(owner, name)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def warm_up() -> None:
    """Imports what a run needs, and computes nothing: threads do not survive a fork."""
    from importlib import import_module

    # Of libraries that start threads when they are imported: OpenMP, OpenBLAS, and pyarrow, if pandas finds it.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    modules = ("plot", "recipes.digits", "recipes.images", "recipes.texts", "training.run", "training.progress")
    for name in ("train", *modules):
        import_module(f"stn_fast.{name}")
    for name in ("sklearn.datasets", "safetensors.torch", "torch.distributed.nn", "torch._dynamo"):
        import_module(name)
    if os.path.isdir("/proc/self/task") and (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise SystemExit(f"kills: {threads} threads after the imports, which a fork would lose: use --whole-processes")


def run_here(arguments: Sequence[str], call: int | None, counted: Path | None = None) -> int:
    """Runs the command line in this process, which kills itself at a change of the disk if ``call`` says which."""
    from stn_fast import train

    if call is not None:
        die_at(call, counted)
    return train.main(arguments)


class Runs:
    """Starts runs, each in a process of its own."""

    def __init__(self, scratch: Path, whole_processes: bool) -> None:
        self.log, self.whole_processes = scratch / "log", whole_processes
        if not whole_processes:
            warm_up()

    def run(
        self, arguments: Sequence[str], delay: float | None = None, call: int | None = None, counted: Path | None = None
    ) -> Ended:
        """One run, killed after ``delay`` seconds or at the change ``call`` of the disk, if it has not ended before."""
        number = self._begin(arguments, call, counted)
        deadline = None if delay is None else time.monotonic() + delay
        while True:
            ended, status = os.waitpid(number, 0 if deadline is None else os.WNOHANG)
            if ended:
                break
            if deadline is not None and time.monotonic() >= deadline:
                os.kill(number, signal.SIGKILL)
                deadline = None
            time.sleep(0.002)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))

    def _begin(self, arguments: Sequence[str], call: int | None, counted: Path | None) -> int:
        if self.whole_processes:
            own = [] if call is None else ["--die-at", str(call), *([str(counted)] if counted else [])]
            program = [__file__, *own, "--"] if own else ["-m", "stn_fast.train"]
            with self.log.open("wb") as log:
                return subprocess.Popen([sys.executable, *program, *arguments], stdout=log, stderr=log, cwd=ROOT).pid
        number = os.fork()
        if number:
            return number
        from stn_fast import plot

        status = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            plot.save_schedule = lambda directories: directories[0]
            status = run_here(arguments, call, counted)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def final(folder: Path) -> dict[str, Any]:
    """What a finished run leaves, without times: {place: value}, with tensors as dtype, shape and bytes."""
    import run_files

    from stn_fast.training import checkpoint

    root = folder / "checkpoints"
    result = run_files.result(folder)
    kept = {"last": checkpoint.steps(root)[-1], "best": result["best_step"]}
    found = {"metrics": run_files.rows(folder), "result": result, "steps": kept}
    for which, step in kept.items():
        state = checkpoint.read(checkpoint.path_of(root, step))
        found |= dict(leaves({key: value for key, value in state.items() if key not in TIMES}, which))
    return found


def leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers in a state, by their places."""
    import torch

    if isinstance(value, torch.Tensor):
        numbers = value.contiguous().reshape(-1).view(torch.uint8)
        yield place, (str(value.dtype), tuple(value.shape), numbers.numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from leaves(item, f"{place}/{number}")
    else:
        yield place, repr(value)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The places at which two runs differ."""
    return [place for place in {**one, **other} if one.get(place) != other.get(place)]


class Failure(Exception):
    """A run that did not survive a kill."""


def check_resumed(ended: Ended, saved: int) -> None:
    """Raises Failure if a run has trained without beginning at its newest checkpoint, that of the step ``saved``."""
    found = re.search(r"^resuming .* after step (\d+)$", ended.said, re.MULTILINE)
    trained = ended.status == 0 or re.search(r"^epoch ", ended.said, re.MULTILINE)
    finished = "is finished; --no-resume would run it again" in ended.said
    if (found and int(found[1]) < saved) or (trained and not (found or finished)):
        raise Failure(f"a run did not begin at its checkpoint of step {saved}:\n{ended.said}")


def survive(
    runs: Runs, recipe: str, methods: Sequence[str], kills: int, chance: random.Random, scratch: Path, *extra: str
) -> Counter[str]:
    """Kills runs of the recipe, by each method in turn, as often as asked for; returns the counts.

    Raises:
        Failure: a run did not end well, or not like the one that nothing disturbed.
    """
    from stn_fast.training import checkpoint

    counts: Counter[str] = Counter()
    undisturbed = {}
    for method in methods:
        folder, counted = scratch / f"{recipe}-{method}", scratch / "changes"
        began = time.monotonic()
        ended = runs.run(command(recipe, method, folder, extra), call=-1, counted=counted)
        if ended.status:
            raise Failure(f"{recipe}, {method}: the undisturbed run ended with status {ended.status}:\n{ended.said}")
        undisturbed[method] = final(folder), time.monotonic() - began, int(counted.read_bytes())
    while counts["kills"] < kills or not counts["runs"]:
        method = methods[counts["runs"] % len(methods)]
        expected, seconds, changes = undisturbed[method]
        folder = scratch / "killed"
        arguments = command(recipe, method, folder, extra)
        killed: list[str] = []
        while True:
            how = chance.choice(("moment", "write")) if counts["kills"] < kills else "none"
            delay = chance.uniform(0, seconds) if how == "moment" else None
            call = chance.randrange(1, changes + 1) if how == "write" else None
            saved = checkpoint.steps(folder / "checkpoints")
            ended = runs.run(arguments, delay, call)
            if saved:
                check_resumed(ended, saved[-1])
            if ended.status == 0:
                break
            if ended.status != -signal.SIGKILL:
                raise Failure(f"{recipe}, {method}, after {', '.join(killed)}: status {ended.status}:\n{ended.said}")
            counts["kills"] += 1
            counts[how] += 1
            counts["saved"] += bool(checkpoint.steps(folder / "checkpoints"))
            killed.append(f"a kill after {delay:.2f} s" if how == "moment" else f"a kill at change {call} of the disk")
        counts["runs"] += 1
        if found := differences(expected, final(folder)):
            raise Failure(f"{recipe}, {method}, after {', '.join(killed)}: differs at {', '.join(found[:9])}")
        shutil.rmtree(folder)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills runs and prints the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=SETTINGS, default=["digits"])
    parser.add_argument("--methods", nargs="+", default=["stn", "delta-stn"], help="default: stn delta-stn")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each recipe (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of stn_fast.train")
    parser.add_argument("--whole-processes", action="store_true", help="start each run anew instead of by a fork")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        runs = Runs(scratch, flags.whole_processes)
        for recipe in flags.recipes:
            chance, began = random.Random(f"{flags.seed} {recipe}"), time.monotonic()
            try:
                counts = survive(runs, recipe, flags.methods, flags.kills, chance, scratch, *flags.set)
            except Failure as failure:
                print(f"FAILED {failure}", flush=True)
                return 1
            print(
                f"{recipe} ({', '.join(flags.methods)}): {counts['kills']} kills survived, {counts['moment']} at a "
                f"random moment and {counts['write']} while writing, {counts['saved']} with a checkpoint, in "
                f"{counts['runs']} runs, whose ends equal those of undisturbed runs bit for bit; "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--die-at"]:  # a run of --whole-processes
        own, given = sys.argv[2 : (end := sys.argv.index("--"))], sys.argv[end + 1 :]
        raise SystemExit(run_here(given, int(own[0]), Path(own[1]) if own[1:] else None))
    raise SystemExit(main())
