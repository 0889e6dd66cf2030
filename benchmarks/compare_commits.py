"""Compares two commits: losses bit for bit, compiled kernels by hash, and speed by interleaved timing.

    python -m benchmarks.compare_commits HEAD~1            a commit with the working tree
    python -m benchmarks.compare_commits v1 v2 --ops gated_lstm --json ratios.json

Each commit has its own folder under build/compare, with its own C++ core, and its own processes. Runs on the CPU. The
exit status is 1 if losses or kernels differ; speed ratios are only printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.timing import calls_in_a_turn
from stn_fast.command_line import Parser, number, run_command, whole_number
from stn_fast.errors import UserError
from stn_fast.files import expanded
from stn_fast.files import replace as replace_file

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ROOT / "build/compare"
# Validation steps from the first cycle on, and few examples to load.
RECIPES = {
    "digits": ["method.warmup_epochs=0"],
    "fashion-mnist-small": ["method.warmup_epochs=0", "train_fraction=0.5"],
    "ptb-small": ["method.warmup_epochs=0", "train_fraction=0.5"],
}
TURN_MICROSECONDS = 5000.0  # what a request takes on its way to a process is little beside it


class Commit:
    """The files of one commit, or the working tree as it is, ready to run."""

    def __init__(self, name: str | None) -> None:
        self.label = name or "the working tree"
        self.folder = ROOT
        if name is not None:
            found = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
            if found is None:
                raise UserError(f"{name}: there is no such commit")
            self.folder = FOLDERS / found[:12]
            if not self.folder.exists():
                _check_out(found, self.folder)
        self.environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_WAIT_POLICY": "passive"}

    def run(self, *arguments: str) -> str:
        """What a Python with these arguments prints; its own complaints where it fails."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{self.label}: {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout

    def turns(self) -> subprocess.Popen[str]:
        """A process that takes turns."""
        command = [sys.executable, "-c", _one_commit(), "turns"]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()


def _check_out(commit: str, folder: Path) -> None:
    """The commit's files, with its core built. A build that fails leaves no folder behind."""
    FOLDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDERS) as temporary:
        files = Path(temporary) / "files"
        files.mkdir()
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(files)], input=archive, check=True)
        built = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=files, capture_output=True, text=True
        )
        if built.returncode:
            raise UserError(f"{commit}: its C++ core can't be built: {built.stderr.strip()[-2000:]}")
        # Where Python looks first, whatever is installed. Older commits lack the link.
        if not (files / "stn_fast/kernels").exists():
            (files / "stn_fast/kernels").symlink_to("../kernels")
        shutil.move(files, folder)


def _one_commit() -> str:
    return (ROOT / "benchmarks/one_commit.py").read_text()


def compare_losses(old: Commit, new: Commit, recipe: str, steps: int, repeats: int) -> dict[str, Any]:
    """Whether the losses of all steps are the same bits, and the time of a step, new to old, over `repeats` runs."""
    runs: dict[str, list[dict[str, list[Any]]]] = {"old": [], "new": []}
    sides = [("old", old), ("new", new)]
    for repeat in range(repeats):
        for side, commit in sides if repeat % 2 == 0 else sides[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                text = commit.run("-c", _one_commit(), "losses", recipe, str(steps), f"{folder}/run", *RECIPES[recipe])
            runs[side].append(json.loads(text))
    # Of all runs, so that one that doesn't repeat itself is seen.
    steps_taken = [list(zip(run["kind"], run["loss"], strict=True)) for run in (*runs["old"], *runs["new"])]
    ratios = [_step(run) / _step(other) for run, other in zip(runs["new"], runs["old"], strict=True)]
    return {
        "recipe": recipe,
        "training_steps": runs["new"][0]["kind"].count("train"),
        "validation_steps": runs["new"][0]["kind"].count("valid"),
        "equal": all(taken == steps_taken[0] for taken in steps_taken),
        "first_difference": next(filter(None, (_difference(steps_taken[0], taken) for taken in steps_taken)), None),
        "step_new_to_old": round(statistics.median(ratios), 4),
    }


def _step(run: dict[str, list[Any]]) -> float:
    """Seconds from one differentiated loss to the next."""
    seconds = run["seconds"]
    return statistics.median(after - before for before, after in itertools.pairwise(seconds))


def _difference(before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]]) -> str | None:
    """Where two runs part; steps are (kind, loss)."""
    for step, (one, other) in enumerate(zip(before, after, strict=False)):
        if one != other:
            shown = [f"{kind} {float.fromhex(loss):.9g}" for kind, loss in (one, other)]
            return f"step {step}: {shown[0]} and {shown[1]}"
    return None if len(before) == len(after) else f"{len(before)} and {len(after)} losses"


def compare_kernels(old: Commit, new: Commit, only: Sequence[str]) -> dict[str, Any]:
    """Which of the shipped configurations have other PTX."""
    found = []
    for commit in (old, new):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            options = ["--hashes", file.name, *(["--only", *only] if only else [])]
            try:
                commit.run("tests/compile_table.py", *options)
            except UserError as error:
                # Exit status 1 also where a configuration may not ship: its hash is written all the same.
                if not Path(file.name).read_text():
                    raise UserError(f"{error}\n(tests/compile_table.py writes hashes since this comparison)") from None
            found.append(json.loads(Path(file.name).read_text()))
    before, after = found
    if not before and not after:
        raise UserError(f"--only {' '.join(only)}: no configuration's label has all of these words")
    both = before.keys() & after.keys()
    return {
        "configurations": len(both),
        "changed": sorted(label for label in both if before[label] != after[label]),
        "removed": sorted(before.keys() - after.keys()),
        "added": sorted(after.keys() - before.keys()),
    }


def compare_speed(old: Commit, new: Commit, ops: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The time of every case, new to old: both take turns, and the one that begins changes every round."""
    sides = {"old": old.turns(), "new": new.turns()}
    try:
        known = [set(_ask(side, {"list": True})) for side in sides.values()]
        names = [name for name in _ask(sides["new"], {"list": True}) if name in known[0]]
        if ops and not any(name.startswith(tuple(ops)) for name in names):
            raise UserError(f"--ops {' '.join(ops)}: no operation of both commits begins so")
        rows = []
        for name in names:
            if not ops or name.startswith(tuple(ops)):
                rows.append(_one_case(sides, name, seconds))
                row = rows[-1]
                print(
                    f"  {name:<52} {row['old_us']:>11.1f} µs {row['new_us']:>11.1f} µs {row['new_to_old']:>7.3f}"
                    f"  ({row['low']:.3f} to {row['high']:.3f}, {row['rounds']} rounds)",
                    flush=True,
                )
        return rows
    finally:
        for side in sides.values():
            if side.stdin is not None:
                side.stdin.close()
            side.wait()


def _ask(process: subprocess.Popen[str], request: dict[str, Any]) -> Any:
    to: IO[str] | None = process.stdin
    answers: IO[str] | None = process.stdout
    if to is None or answers is None:
        raise RuntimeError("the process has no pipes")
    to.write(json.dumps(request) + "\n")
    to.flush()
    line = answers.readline()
    if not line:
        raise UserError(f"a process that takes turns ended with status {process.wait()} at {request}")
    return json.loads(line)


def _one_case(sides: dict[str, subprocess.Popen[str]], name: str, seconds: float) -> dict[str, Any]:
    first = [_ask(side, {"case": name}) for side in sides.values()]
    calls = calls_in_a_turn(max(first), TURN_MICROSECONDS)
    rounds = max(7, min(400, round(seconds * 1e6 / (calls * sum(first)))))
    times: dict[str, list[float]] = {"old": [], "new": []}
    for turn in range(rounds):
        for side in ("old", "new") if turn % 2 == 0 else ("new", "old"):
            times[side].append(_ask(sides[side], {"calls": calls}))
    ratios = sorted(new / old for new, old in zip(times["new"], times["old"], strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "case": name,
        "old_us": round(statistics.median(times["old"]), 2),
        "new_us": round(statistics.median(times["new"]), 2),
        "new_to_old": round(quartiles[1], 4),
        "low": round(quartiles[0], 4),
        "high": round(quartiles[2], 4),
        "rounds": rounds,
    }


def print_means(rows: Sequence[dict[str, Any]]) -> None:
    """Geometric means over the shapes and modes of each operation."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["case"].split()[0], []).append(row["new_to_old"])
    for op, ratios in groups.items():
        mean = statistics.geometric_mean(ratios)
        print(f"  {op:<30} geometric mean {mean:.3f}, worst {max(ratios):.3f}, of {len(ratios)} cases")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = Parser("python -m benchmarks.compare_commits", (__doc__ or "").splitlines()[0])
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", nargs="?", help="a commit (default: the files as they are)")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="whose losses to compare")
    parser.add_argument("--steps", type=whole_number, default=20, metavar="N", help="steps of each, both kinds (20)")
    parser.add_argument("--repeats", type=whole_number, default=3, metavar="N", help="runs whose steps are timed (3)")
    parser.add_argument("--kernels", action="store_true", help="compile every shipped configuration, compare its PTX")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="--kernels, but only labels with all words"
    )
    parser.add_argument("--speed", action="store_true", help="time the operations")
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="--speed, but only names that begin so")
    parser.add_argument("--seconds", type=number, default=4.0, metavar="S", help="for each case (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    return argparse.Namespace(**parser.given(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.steps < 2 or options.repeats < 1:
        raise UserError(f"--steps must be at least 2 and --repeats 1; got {options.steps} and {options.repeats}")
    path = None if options.json is None else expanded(options.json, "--json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    old, new = Commit(options.old), Commit(options.new)
    results: dict[str, Any] = {"old": old.label, "new": new.label}
    wrong = 0
    if options.recipes:
        print(f"losses of {options.steps} steps, {old.label} and {new.label}")
        results["losses"] = []
    for recipe in options.recipes:
        row = compare_losses(old, new, recipe, options.steps, options.repeats)
        results["losses"].append(row)
        wrong += not row["equal"]
        verdict = "the same bits" if row["equal"] else f"DIFFERENT at {row['first_difference']}"
        print(
            f"  {recipe:<22} {row['training_steps']} training and {row['validation_steps']} validation losses: "
            f"{verdict}; time of a step, new to old, {row['step_new_to_old']:.3f}",
            flush=True,
        )
    if options.kernels or options.only:
        found = results["kernels"] = compare_kernels(old, new, options.only)
        wrong += any(found[kind] for kind in ("changed", "removed", "added"))
        print(f"{found['configurations']} configurations of both, {len(found['changed'])} with other PTX")
        for kind in ("changed", "removed", "added"):
            for label in found[kind]:
                print(f"  {kind} {label}")
    if options.speed or options.ops:
        print("operations: old, new, new to old (quartiles)")
        results["speed"] = compare_speed(old, new, options.ops, options.seconds)
        print_means(results["speed"])
    if path is not None:
        replace_file(path, (json.dumps(results, indent=1) + "\n").encode())
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
