"""Times every operation against its baselines and its limit, interleaved, as a table and as rows of JSON.

    python -m benchmarks.ratios --device cpu --json benchmarks/results/cpu.json

All times are in microseconds. benchmarks/README.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.cases import Case, all_cases
from benchmarks.timing import Clock, Timings, Turns, first_line, interleave, launches, peak_bytes
from stn_fast.command_line import run_command
from stn_fast.files import expanded
from stn_fast.files import replace as replace_file
from stn_fast.values import to_json

Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor and the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [
            line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of the software used in the measurement."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for module in ("triton", "stn_fast"):
        try:
            found[module] = importlib.import_module(module).__version__
        except ImportError:
            found[module] = "missing"
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # torch's older question fails once this one is set
    found["float32_matmul_precision"] = "high" if tf32 else "highest"
    return found


def limit_of(timings: Timings) -> str | None:
    """The faster of the limits that were timed."""
    limits = [name for name in timings.names if name.startswith("limit")]
    return min(limits, key=lambda name: timings.percentile(name, 50), default=None)


def measure(case: Case, seconds: float, min_rounds: int, clock: Clock | None = None) -> tuple[list[Row], Timings]:
    """One row for every provider of a case that can be called; `Timings.failed` has the others."""
    providers = case.providers()
    timings = interleave(providers, case.device, seconds, min_rounds, clock=clock)
    limit = limit_of(timings)
    common = {
        "op": case.op,
        "mode": case.mode,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    machine = {"device": device_name(case.device), "versions": versions()}
    rows = []
    for name in timings.names:
        to = {"limit": limit, "eager": "eager", "plain": "plain_lstm"}
        rows.append(
            common
            | {"provider": name}
            | times(name, timings)
            | {f"ratio_to_{key}": ratio(timings, name, other) for key, other in to.items()}
            | {
                "peak_bytes": peak_bytes(providers[name], case.device),
                "launches": launches(providers[name], case.device) if name == "stn_fast" else None,
            }
            | machine
        )
    return rows, timings


def times(name: str, timings: Timings) -> Row:
    """Percentiles of a provider's time, and how they were measured."""
    turns = timings.turns[name]
    return {f"p{q}": round(timings.percentile(name, q), 2) for q in (20, 50, 80)} | {
        "captured": turns.captured,
        "host_us": None if turns.host_us is None else round(turns.host_us, 2),
        "host_bound": turns.host_bound,
    }


def ratio(timings: Timings, name: str, to: str | None) -> float | None:
    """`Timings.ratio` as rows have it; None where the other took no part."""
    return round(timings.ratio(name, to), 4) if to in timings.names and to is not None else None


def print_case(case: Case, rows: Sequence[Row], timings: Timings) -> None:
    """A table of one case, fastest first, and for a validation backward its share of the full one."""
    print(f"\n{case}   ({len(timings.microseconds)} rounds)", flush=True)
    on_cuda = case.device.type == "cuda"
    print(
        f"  {'provider':<28}{'p50 µs':>12}{'p20':>12}{'p80':>12}{'/limit':>9}{'/eager':>9}{'peak MB':>10}"
        + (f"{'host µs':>10}  how" if on_cuda else "")
    )
    for row in sorted(rows, key=lambda row: row["p50"]):
        to_limit, to_eager = (
            f"{row[key]:.3f}" if row[key] is not None else "-" for key in ("ratio_to_limit", "ratio_to_eager")
        )
        print(
            f"  {row['provider']:<28}{row['p50']:>12.1f}{row['p20']:>12.1f}{row['p80']:>12.1f}{to_limit:>9}"
            f"{to_eager:>9}{row['peak_bytes'] / 1e6:>10.2f}"
            + (f"{row['host_us']:>10.1f}  {how(timings.turns[row['provider']])}" if on_cuda else "")
        )
    for name, error in timings.failed.items():
        print(f"  {name:<28} failed: {error}")
    if case.mode == "valid_backward" and {"stn_fast", "stn_fast_full_backward"} <= set(timings.names):
        print(f"  valid / full backward: {timings.ratio('stn_fast', 'stn_fast_full_backward'):.3f}")
    if case.op in ("perturb", "augment") and "stn_fast" in timings.names:
        others = [name for name in ("eager", "pillow") if name in timings.names]
        print("  " + ", ".join(f"{name} / stn_fast: {timings.ratio(name, 'stn_fast'):.1f}" for name in others))
    sys.stdout.flush()


def how(turns: Turns) -> str:
    """How a provider was timed on CUDA."""
    if turns.captured:
        return "graph"
    return ("host-bound" if turns.host_bound else "eager") + f" ({turns.why_not})"


def print_means(rows: Sequence[Row]) -> None:
    """Geometric means of the package's ratios over the shapes of each operation and mode that has several."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["provider"] == "stn_fast":
            groups.setdefault((row["op"], row["mode"], row["dtype"]), []).append(row)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    if several:
        print("\ngeometric means of stn_fast over shapes: to the limit, to eager")
    for (op, mode, dtype), group in several.items():
        means = [
            geometric_mean([row[key] for row in group]) if all(row[key] for row in group) else None
            for key in ("ratio_to_limit", "ratio_to_eager")
        ]
        print(f"  {op} {mode} {dtype}: " + ", ".join("-" if mean is None else f"{mean:.3f}" for mean in means))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes a JSON array with one row per line, so that two recordings can be compared with diff.

    The file is replaced atomically: an interrupted process leaves either the old rows or the new ones.
    """
    path = expanded(path, "--json")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(to_json(row) for row in rows)
    replace_file(path, f"[\n{lines}\n]\n".encode())


def without_cuda(device: str) -> str | None:
    """Why ``--device`` can't be had, in one line."""
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device on this machine; use --device cpu"
    return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only operations whose names start so")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="only these modes")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), help="only these dtypes; on the CPU only float32"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case, warm-up not counted")
    parser.add_argument("--rounds", type=int, default=15, help="minimum number of rounds of each case")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes long to warm up"
    )
    parser.add_argument("--threads", type=int, help="threads of torch, instead of its own choice")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, nothing compiled: only checks that everything runs"
    )
    return parser.parse_args(arguments)


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options name, in the order in which they are measured."""
    return [
        replace(case, compiled=case.compiled and not options.no_compile)
        for case in all_cases(torch.device(options.device), options.quick)
        if (not options.ops or case.op.startswith(tuple(options.ops)))
        and (not options.modes or case.mode in options.modes)
        and (not options.dtypes or str(case.dtype).removeprefix("torch.") in options.dtypes)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if (wrong := without_cuda(options.device)) is not None:
        print(wrong, file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device, cases = torch.device(options.device), chosen_cases(options)
    if not cases:
        asked = " ".join(f"--{key} {given}" for key in ("ops", "modes", "dtypes") if (given := getattr(options, key)))
        print(f"{asked}: there is no such case", file=sys.stderr)
        return 2
    print(f"{device_name(device)}; " + ", ".join(f"{key} {value}" for key, value in versions().items()))
    rows: list[Row] = []
    failed = 0
    for case in cases:
        try:
            measured, timings = measure(case, *((0.05, 3) if options.quick else (options.seconds, options.rounds)))
        except Exception as error:  # one case that fails must not cost the others their rows
            print(f"\n{case}   failed: {first_line(error)}", flush=True)
            failed += 1
            continue
        print_case(case, measured, timings)
        failed += len(timings.failed)
        rows += measured
        if options.json:
            write(options.json, rows)
    print_means(rows)
    if failed:
        print(f"\n{failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
