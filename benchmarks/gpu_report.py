"""Runs all tests and measurements that need a GPU on this machine's GPU, within nine minutes: `make gpu-report`.

    python -m benchmarks.gpu_report --out build/gpu
    python -m benchmarks.gpu_report --dry

Nothing is installed or built, and no network is used: the Python that runs this needs CUDA torch, Triton, and the
packages of the extras `train` and `test`; the kernels need no C++. Parts run one after the other, the most informative
first, each in its own process with a time limit; a failure does not stop the next part. The output folder contains:

    report.log     the output of all parts
    summary.md     target speeds and measurements, on one page
    machine.json   versions, bandwidth and rates
    rows.json      rows of the benchmarks, rewritten after each part
    <device>.json  the autotuner's choices, to be shipped as kernels/tuned/<device>.json

A dry run, which needs no GPU, collects the tests as on a machine with a GPU and nothing built, imports every module,
checks the arguments of each command, and prints the planned times, for tests from the counted compilations.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from unittest import mock

from stn_fast.command_line import run_command
from stn_fast.errors import UserError
from stn_fast.files import expanded, replace

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 560.0
CLOSING = 30.0  # seconds kept for the parts at the end, which turn into pages and tables what the others have left
GRACE = 4.0  # seconds that a part has to end after it was asked to
UNINSTALLED = ROOT / "benchmarks" / "uninstalled"
TESTS = ("-m", "pytest", "-q", "--tb=short", "-p", "tests.tell_at_once", "-p", "no:cacheprovider", "-m", "cuda")
LARGE = "2_to_the_31"
LOW = ("bfloat16",)
CYCLE = ("--precision", "bf16", "--modes", "cycle", "--seconds", "3", "--rounds", "7")
SHOWN_LINES = 40
PROCESSES = 12  # that tests run in side by side, at most
# Two threads a process: what is timed on the host is Python, and tests run side by side.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2"}
UNTUNED = {"STN_FAST_AUTOTUNE": "0"}
# What the plan assumes, in seconds: to import torch and collect, to compile a kernel, to run a test, to measure a case.
START, COMPILATION, TEST, CASE = 12.0, 0.9, 0.1, 2.0


@dataclass(frozen=True)
class Part:
    """One command of the report: ``arguments`` of Python, which find {work} and {out} replaced by folders.

    ``limit`` is when it is ended, in seconds after its start. Lines of its output that ``shows`` matches appear on the
    terminal too.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    shows: str
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def module(self) -> str:
        return self.arguments[1]


def pytest_part(name: str, limit: float, *selection: str, processes: int = 1) -> Part:
    """A part that runs the tests of the selection which compute on a CUDA device, the tuner off unless a test asks."""
    aside = ("-n", str(processes), "--dist", "worksteal") if processes > 1 else ()
    shows = r"^(FAILED|ERROR)|(passed|failed|error).* in "
    return Part(name, (*TESTS, *aside, "--maxfail=60", *selection), limit, shows, UNTUNED)


def benchmark_part(name: str, limit: float, module: str, *options: str) -> Part:
    """A part that measures and writes rows."""
    shows = r"^\S+ (train|full|valid|forward|cycle)|^  (stn_fast|limit|plain|channels_last)|ratio|Error|error"
    rows = ("--json", f"{{work}}/{name.replace(' ', '-')}.rows.json")
    return Part(name, ("-m", f"benchmarks.{module}", "--device", "cuda", *options, *rows), limit, shows)


def ratios_part(name: str, limit: float, mode: str, *operations: str, dtypes: Sequence[str] = ()) -> Part:
    """Rows of operations, nothing compiled by torch.compile, which would take the time of everything else."""
    chosen = ("--dtypes", *dtypes) if dtypes else ()
    options = ("--no-compile", "--seconds", "0.3", "--rounds", "7", "--modes", mode, *chosen)
    return benchmark_part(name, limit, "ratios", *options, "--ops", *operations)


def measuring() -> tuple[Part, ...]:
    """The parts that measure: the rows that `benchmarks.aims` reads."""
    return (
        ratios_part("gated_lstm", 35, "train", "gated_lstm", dtypes=LOW),
        benchmark_part("alexnet", 25, "steps", *CYCLE),
        benchmark_part("language-model", 25, "language_steps", "--sizes", "ptb", *CYCLE),
        ratios_part("gated_linear", 30, "train", "gated_linear", dtypes=LOW),
        ratios_part("gated_conv2d", 48, "train", "gated_conv2d", dtypes=LOW),
        ratios_part("other", 24, "forward", "augment", "perturb"),
    )


def parts(processes: int) -> tuple[Part, ...]:
    """The report, in order."""
    return (
        Part("machine", ("-m", "benchmarks.preflight", "--json", "{out}/machine.json"), 30, "."),
        pytest_part("steps", 45, "tests/layers", "tests/models", "tests/training", processes=min(processes, 6)),
        pytest_part("kernels", 150, "tests/kernels", "tests/ops", "-k", f"not {LARGE}", processes=processes),
        pytest_part("large", 32, "tests/kernels", "-k", LARGE),
        Part("recipes", ("-m", "benchmarks.smoke", "--device", "cuda"), 35, ".", UNTUNED),
        Part("compile", ("-m", "benchmarks.gpu_report", "--compile"), 50, "."),
        *measuring(),
    )


def closing() -> tuple[Part, ...]:
    """What is done in any case, at the end."""
    return (
        Part("tuned", ("-m", "stn_fast.kernels.autotune", "--export", "{out}"), 12, "."),
        Part("summary", ("-m", "benchmarks.summary", "{out}", "--out", "{out}/summary.md"), 18, "."),
    )


def compile_all() -> int:
    """Lets every measuring part run once, side by side, for its kernels to be in Triton's cache when time counts.

    What the tuner chooses meanwhile, with everything running at once, is thrown away.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        processes = {}
        for part in measuring():
            arguments = [*arguments_of(part, work, work), "--seconds", "0", "--rounds", "1"]
            with (work / f"{part.name}.log").open("wb") as log:
                processes[part.name] = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT, env=environment(work, part), stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        for name, process in processes.items():
            print(f"{name}: exit status {process.wait()}", flush=True)
    return 0


def have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def environment(work: Path, part: Part) -> dict[str, str]:
    """The variables of a part's process, which finds the package in this clone."""
    path = [str(UNINSTALLED), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **ENVIRONMENT,
        "STN_FAST_CACHE": str(work / "cache"),
        "PYTHONPATH": os.pathsep.join(path),
        **part.environment,
    }


def arguments_of(part: Part, work: Path, out: Path) -> list[str]:
    return [argument.format(work=work, out=out) for argument in part.arguments]


def run_part(part: Part, work: Path, out: Path, limit: float) -> str:
    """Runs a part, ends it within ``limit`` seconds, adds its output to report.log and says how it ended."""
    log = work / f"{part.name}.log"
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments_of(part, work, out)],
            cwd=ROOT, env=environment(work, part), stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(max(1.0, limit - GRACE))
            ending = "ended well" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            ending = "ended by force"
        finally:
            end(process)
    took = time.monotonic() - start
    text = log.read_text(errors="replace")
    with (out / "report.log").open("a") as report:
        report.write(f"===== {part.name}: {ending}, {took:.1f} s\n{text}\n")
    shown = [line[:180] for line in text.splitlines() if re.search(part.shows, line)]
    for line in shown[-SHOWN_LINES:]:
        print(f"    {line}")
    return f"{ending}, {took:.1f} s"


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started, whether it still runs or not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE / 2)


def collect_rows(work: Path, out: Path) -> None:
    """rows.json: the rows of all parts so far."""
    rows: list[object] = []
    for file in sorted(work.glob("*.rows.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(ValueError):  # a file that its part was writing when its time was over
            rows += json.loads(file.read_text())
    contents = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    replace(out / "rows.json", contents.encode())


def report(chosen: Sequence[Part], last: Sequence[Part], out: Path, budget: float, start: float) -> int:
    """Runs the parts, and in any case the ``last`` ones; returns how many didn't end well, at most 1."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.log").write_text("")
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for part in (*chosen, *last):
            left = budget - (time.monotonic() - start) - (0 if part in last else CLOSING)
            if left < GRACE + 2 and part not in last:
                ending = "left out: no time"
            else:
                ending = run_part(part, work, out, part.limit if part in last else min(part.limit, left))
                collect_rows(work, out)
            print(f"[{time.monotonic() - start:4.0f} s] {part.name}: {ending}", flush=True)
            problems += [part.name] if not ending.startswith("ended well") else []
    print(f"everything is in {out}" + (f"; look at {', '.join(problems)}" if problems else ""))
    return min(len(problems), 1)


class Parsed(Exception):
    """The command has taken its arguments."""


def parse_only(module: str, arguments: Sequence[str]) -> None:
    """Runs a command up to where it has parsed its arguments, with a CUDA device claimed to be there."""
    parse: Callable[..., tuple[argparse.Namespace, list[str]]] = argparse.ArgumentParser.parse_known_args

    def parsed(parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: object) -> None:
        unknown = parse(parser, given)[1]
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", parsed), contextlib.suppress(Parsed):
        status = importlib.import_module(module).main(list(arguments))
        raise UserError(f"{module} parsed no arguments, and ended with status {status}")


def import_everything() -> int:
    """Imports every module of the package, its kernels and the benchmarks; returns how many there are."""
    count = 0
    for package in ("stn_fast", "stn_fast.kernels", "benchmarks"):
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(found.name)
            count += 1
    return count


def selected(part: Part, work: Path, out: Path) -> int:
    """How many tests a part selects on a machine with a CUDA device."""
    arguments = [*arguments_of(part, work, out), "--collect-only", "-p", "tests.as_on_cuda"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(work, part), capture_output=True, text=True
    )
    found = re.search(r"(\d+)(?:/\d+)? tests collected", done.stdout)
    if done.returncode or found is None:
        raise UserError(f"{part.name}: its tests can't be collected:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return int(found[1])


def cases(part: Part, work: Path, out: Path) -> int:
    """How many cases a part of `benchmarks.ratios` measures."""
    from benchmarks import ratios

    options = ratios.parse(arguments_of(part, work, out)[2:])
    found = [case.op for case in ratios.chosen_cases(options)]
    if missing := [name for name in options.ops if not any(op.startswith(name) for op in found)]:
        raise UserError(f"{part.name}: no case's name starts with {', '.join(missing)}")
    return len(found)


def compilations() -> dict[str, int]:
    """How many kernels the tests of a part compile, as `make count-compilations` has counted them."""
    found: dict[str, int] = json.loads((ROOT / "benchmarks" / "results" / "compilations.json").read_text())
    return found


def dry_run(chosen: Sequence[Part], processes: int) -> int:
    """Checks selections, imports and arguments, and prints the plan; an error says what is wrong.

    Raises:
        UserError: a selection is empty, a part has less time than it is planned to take, or the parts may take longer
            than the budget.
        SystemExit: a command doesn't take its arguments; it has said why.
    """
    print(f"{import_everything()} modules import; seconds with {processes} processes, planned and at most:")
    counted = compilations()
    planned = 0.0
    with tempfile.TemporaryDirectory() as folder:
        work = out = Path(folder)
        for part in chosen:
            seconds = START
            if part.module == "pytest":
                tests, compiled = selected(part, work, out), counted.get(part.name, 0)
                seconds += (tests * TEST + compiled * COMPILATION) / (processes if "-n" in part.arguments else 1)
                told = f"{tests} tests, {compiled} compilations"
            else:
                parse_only(part.module, arguments_of(part, work, out)[2:])
                told = "arguments are right"
                if part.module == "benchmarks.ratios":
                    seconds += CASE * (measured := cases(part, work, out))
                    told = f"{measured} cases"
            if seconds > part.limit:
                raise UserError(f"{part.name} is planned to take {seconds:.0f} s, and is ended after {part.limit:.0f}")
            planned += seconds
            print(f"{part.name:<16}{seconds:5.0f}{part.limit:5.0f}   {told}", flush=True)
    total = sum(part.limit for part in chosen)
    print(f"{'together':<16}{planned:5.0f}{total:5.0f}   of {BUDGET:.0f}")
    if total > BUDGET:
        raise UserError(f"the parts may take {total:.0f} s, and {BUDGET:.0f} are there")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Reports, or checks that it could."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR", help="default: build/gpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all (default: {BUDGET:.0f})")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the report's order")
    parser.add_argument("--dry", action="store_true", help="check everything that needs no GPU, and run nothing")
    parser.add_argument("--compile", action="store_true", help="run what is measured once, to compile its kernels")
    options = parser.parse_args(arguments)
    if options.compile:
        return compile_all()
    processes = min(PROCESSES, os.cpu_count() or 1) if have("xdist") else 1
    everything = (*parts(processes), *closing())
    names = [part.name for part in everything]
    if unknown := set(options.parts or ()) - set(names):
        raise UserError(f"no part is named {', '.join(sorted(unknown))}; they are {', '.join(names)}")
    chosen = [part for part in everything if not options.parts or part.name in options.parts]
    if options.dry:
        return dry_run(chosen, PROCESSES)
    last = [part for part in chosen if part in closing()]
    first = [part for part in chosen if part not in last]
    return report(first, last, expanded(options.out, "--out"), options.budget, start)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
