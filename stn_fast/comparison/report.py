"""The printed tables of a comparison, from what ``table.summarise`` returns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from stn_fast.comparison.kept_runs import Row
from stn_fast.terminal import aligned, printable

UNMOVED = ("fixed", "frozen")  # their hyperparameters end where they start
COST = (
    "CPU s is the median per run or search, also as a multiple of one fixed run; steps are its part without\n"
    "evaluations and checkpoints, examples those that steps read. A gated pass costs about two plain ones, so that\n"
    "examples understate self-tuning; the Neumann products of one-pass are only in the CPU times."
)


def report(summary: Row) -> str:
    """All tables: scores, methods, where tuned hyperparameters end, and tests."""
    parts = [_scores(summary["scores"]), _methods(summary["methods"])]
    moving = [entry for entry in summary["methods"] if entry["ends"] and entry["method"] not in UNMOVED]
    if moving:
        parts.append(_ends(moving))
    if summary["tests"]:
        parts.append(_tests(summary["tests"]))
    return "\n\n".join(parts)


def _scores(scores: Sequence[Row]) -> str:
    of_text = "test_perplexity" in scores[0]
    measure = "perplexity" if of_text else "loss"
    costs = ["CPU s", "x fixed", "steps x fixed", "examples x fixed"]
    head = ["method", "guess", "seeds", f"valid {measure}", f"test {measure}", *costs]
    lines = []
    for entry in scores:
        cells = [_range(entry[f"{part}_{measure}"]) for part in ("valid", "test")]
        multiples = [_times(entry[f"{name}_of_fixed"]) for name in ("cpu_seconds", "step_cpu_seconds", "examples")]
        cost = [_times(entry["cpu_seconds"], ".1f"), *multiples]
        lines.append([entry["method"], _where(entry), str(entry["seeds"]), *cells, *cost])
    note = f"Best validation {measure} and test {measure} there: median over seeds (smallest to largest)."
    return f"{note}\n{COST}\n\n{aligned(head, lines, left=2)}"


def _where(entry: Row) -> str:
    if entry["guess"] is not None:
        return f"from {entry['guess']}"
    return f"{entry['trials']} trials" if entry["part"] == "all" else entry["part"]


def _methods(methods: Sequence[Row]) -> str:
    scores = [name for name in ("test_loss", "test_perplexity") if name in methods[0]]
    heads = [head for name in scores for head in (f"median {name}".replace("_", " "), "spread")]
    head = ["method", *heads, "worse than fixed", "not finite"]
    lines = []
    for entry in methods:
        pairs = entry["compared_with_fixed"]
        worse = f"{entry['worse_than_fixed']} of {pairs}" if pairs else "-"
        counts = [worse, f"{entry['not_finite']} of {entry['runs']}"]
        cells = [(f"{entry[name]['median']:.4g}", _times(entry[f"spread_of_{name}"], ".4f")) for name in scores]
        lines.append([entry["method"], *itertools.chain(*cells), *counts])
    note = (
        "Over all guesses and seeds: median test score, its spread (largest / smallest), runs with a larger test loss\n"
        "than fixed from the same guess and seed, and runs or trials that became non-finite."
    )
    return f"{note}\n\n{aligned(head, lines, left=1)}"


def _ends(methods: Sequence[Row]) -> str:
    head = ["method", "hyperparameter", "mean", "deviation", "smallest", "largest"]
    parts = ("mean", "deviation", "smallest", "largest")
    lines = [
        [entry["method"], printable(name), *(f"{values[part]:.3g}" for part in parts)]
        for entry in methods
        for name, values in entry["ends"].items()
    ]
    note = "Where hyperparameters end, over all guesses and seeds; for a search, those of its best trial."
    return f"{note}\n\n{aligned(head, lines, left=2)}"


def _tests(tests: Sequence[Row]) -> str:
    head = ["method", "against", "seeds", "better", "p", "smallest p"]
    lines = [
        [
            test["reference"],
            test["method"],
            str(test["pairs"]),
            str(test["reference_better"]),
            f"{test['p']:.2g}",
            f"{test['smallest_p']:.2g}",
        ]
        for test in tests
    ]
    note = (
        "Wilcoxon's exact signed-rank test of test losses (two-sided), paired by seed. From several guesses, the loss\n"
        "of a seed is the median over them. Seeds without a difference are left out.\n"
        "The smallest p that n seeds can give is 2^(1-n)."
    )
    return f"{note}\n\n{aligned(head, lines, left=2)}"


def _range(values: Row) -> str:
    return f"{values['median']:.4g} ({values['smallest']:.4g} to {values['largest']:.4g})"


def _times(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"
