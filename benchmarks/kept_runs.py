"""Flags and cells of commands that keep their runs, by which a command that is stopped continues where it stopped."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence


def add_kept_run_flags(it: argparse.ArgumentParser) -> None:
    """The flags of a command that keeps its runs."""
    it.add_argument("--out", metavar="FILE", help="JSON lines: finished runs are added, and not made again")
    it.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: %(default)s)")
    it.add_argument("--epochs", type=int, help="instead of the recipe's own")
    it.add_argument("--data-root", metavar="DIR", default=os.environ.get("STN_FAST_DATA"), help="data sets")


def mean_and_range(values: Sequence[float], form: str = ".4g") -> str:
    """Mean (smallest to largest)."""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
