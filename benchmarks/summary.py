"""Compares target speeds with the measured rows in a folder, on one page.

    python -m benchmarks.summary build/gpu

Reads every JSON file below the folder, including damaged and incomplete ones as far as possible, and prints a table for
each GPU. Rows of a CPU are ignored. Predictions are from `benchmarks.cost_model`, with the rates in the folder's
machine.json if it exists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.aims import AIMS, Row, Rows
from benchmarks.cost_model import H100, PREDICTIONS, Machine, measured_machine
from benchmarks.records import on_cuda, read_machine, read_rows
from stn_fast.command_line import run_command

NOT_MEASURED = "not measured"


def table(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Markdown: a line for each target with the measured and predicted figures, and whether it is met."""
    recorded = Rows(rows)
    lines = ["| what | aim | measured | predicted | |", "|---|---|---|---|---|"]
    for aim in AIMS:
        figure = aim.figure(recorded)
        measured = NOT_MEASURED if figure is None else f"{figure.value:.3g} {aim.unit}".strip()
        said = "" if figure is None else "met" if aim.met(figure) else "missed"
        note = f" ({figure.note})" if figure is not None and figure.note else ""
        predicted = f"{PREDICTIONS[aim.key](machine).figure:.3g} {aim.unit}".strip()
        lines.append(f"| {aim.what} | {aim.said} | {measured} | {predicted} | {said}{note} |")
    return lines


def summary(directory: Path) -> str:
    """The page."""
    rows, problems = read_rows(directory)
    content = read_machine(directory / "machine.json")
    machine = measured_machine(content) if content else H100
    lines = ["# Aims and figures", ""]
    devices = list(dict.fromkeys(row["device"] for row in rows if on_cuda(row)))
    for device in devices or [f"no GPU: {NOT_MEASURED}"]:
        own = [row for row in rows if on_cuda(row) and row["device"] == device]
        lines += [f"## {device}", "", *table(own, machine), ""]
        met = [aim.met(figure) for aim in AIMS if (figure := aim.figure(Rows(own))) is not None]
        lines += [f"{sum(met)} met, {len(met) - sum(met)} missed, {len(AIMS) - len(met)} {NOT_MEASURED}.", ""]
    lines += [f"Predicted for {machine.name}: see benchmarks/cost_model.py."]
    lines += ["", *(f"- {problem}" for problem in problems)] if problems else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page; returns 0 whatever the folder holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="with the rows, as build/gpu or benchmarks/results")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page here too")
    options = parser.parse_args(arguments)
    page = summary(options.directory)
    print(page)
    if options.out:
        options.out.write_text(page + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
