"""The numbers of a comparison: medians and ranges, spreads, ends of hyperparameters, and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stn_fast.comparison.curves import Curve, curve_of
from stn_fast.comparison.kept_runs import Row
from stn_fast.comparison.plan import groups
from stn_fast.comparison.runs import score
from stn_fast.comparison.search import SEARCHES
from stn_fast.extras import extra


@dataclass(frozen=True)
class Outcome:
    """A finished run, or a search with all of its trials.

    ``valid`` and ``test`` are losses at the lowest validation loss, infinite for a run that became non-finite.
    ``seconds`` is CPU time, ``examples`` counts those that training and validation steps have read, and ``ends`` are
    the final hyperparameters, for a search those of its best trial. ``not_finite`` of the ``runs`` became non-finite.
    """

    method: str
    guess: str | None
    seed: int
    valid: float
    test: float
    seconds: float
    examples: int
    ends: dict[str, float]
    runs: int
    not_finite: int
    curve: Curve


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """The outcome of every run and every search."""
    return [_outcome(*key, each) for key, each in groups(list(rows))]


def _outcome(method: str, guess: str | None, seed: int, rows: Sequence[Row]) -> Outcome:
    best = min(rows, key=lambda row: score(row, "valid_loss"))
    return Outcome(
        method=method,
        guess=guess,
        seed=seed,
        valid=score(best, "valid_loss"),
        test=score(best, "test_loss"),
        seconds=sum(row["cpu_seconds"] for row in rows),
        examples=sum(row["train_examples"] + row["valid_examples"] for row in rows),
        ends=best.get("hyperparameters_end", {}),
        runs=len(rows),
        not_finite=sum(row["diverged"] is not None for row in rows),
        curve=curve_of(rows),
    )


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the printed table says, from all ``rows`` of a comparison.

    ``scores``: one entry for every method and guess; for a search, also what it had found after the median CPU time of
    an stn run. ``methods``: spread, counts and ends of every method over all guesses and seeds. ``tests``: stn against
    every other method.
    """
    found = outcomes(rows)
    is_text = any("test_perplexity" in row for row in rows)
    return {
        "scores": list(_scores(found, perplexity if is_text else None)),
        "methods": [_method(method, found, perplexity if is_text else None) for method in _methods(found)],
        "tests": [test for method in _methods(found) if (test := paired_test(found, method)) is not None],
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite if that is too large for a float."""
    return math.exp(loss) if loss < 709 else math.inf


def _methods(found: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(each.method for each in found))


def _scores(found: Sequence[Outcome], transform: Callable[[float], float] | None) -> Iterable[Row]:
    fixed = [each for each in found if each.method == "fixed"]
    tuned = [each for each in found if each.method == "stn"]
    for method, guess in dict.fromkeys((each.method, each.guess) for each in found):
        group = [each for each in found if (each.method, each.guess) == (method, guess)]
        losses = [(each.valid, each.test) for each in group]
        compute = [each.seconds for each in group]
        own = {"method": method, "guess": guess, "seeds": len(group), "trials": group[0].runs, "part": "all"}
        reads = _median(each.examples for each in group)
        of_fixed = {"examples": reads, "examples_of_fixed": ratio(reads, [each.examples for each in fixed])}
        yield {**own, **_entry(losses, compute, fixed, transform), **of_fixed}
        if method in SEARCHES and tuned:
            limit = _median(each.seconds for each in tuned)
            losses = [each.curve.at(limit) for each in group]
            compute = [min(limit, each.seconds) for each in group]
            entry = _entry(losses, compute, fixed, transform)
            part = "in the CPU time of one stn run"
            yield {**own, "part": part, **entry, "examples": None, "examples_of_fixed": None}


def _entry(
    losses: Sequence[tuple[float, float]],
    compute: Sequence[float],
    fixed: Sequence[Outcome],
    transform: Callable[[float], float] | None,
) -> Row:
    entry: Row = {}
    for name, values in zip(("valid", "test"), zip(*losses, strict=True), strict=True):
        entry[f"{name}_loss"] = _range(values)
        if transform is not None:
            entry[f"{name}_perplexity"] = _range([transform(value) for value in values])
    seconds = _median(compute)
    return {**entry, "cpu_seconds": seconds, "cpu_of_fixed": ratio(seconds, [each.seconds for each in fixed])}


def _range(values: Sequence[float]) -> Row:
    return {"median": _median(values), "smallest": min(values), "largest": max(values)}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(value: float, base: Sequence[float]) -> float | None:
    """``value`` as a multiple of the median of ``base``; None without one."""
    return value / _median(base) if base and _median(base) > 0 else None


def _method(method: str, found: Sequence[Outcome], transform: Callable[[float], float] | None) -> Row:
    group = [each for each in found if each.method == method]
    fixed = {(each.guess, each.seed): each.test for each in found if each.method == "fixed"}
    pairs = [(each.test, fixed[each.guess, each.seed]) for each in group if (each.guess, each.seed) in fixed]
    entry: Row = {"method": method, "spread_of_test_loss": spread([each.test for each in group])}
    if transform is not None:
        entry["spread_of_test_perplexity"] = spread([transform(each.test) for each in group])
    return {
        **entry,
        "worse_than_fixed": sum(own > other for own, other in pairs) if method != "fixed" else None,
        "compared_with_fixed": len(pairs) if method != "fixed" else 0,
        "not_finite": sum(each.not_finite for each in group),
        "runs": sum(each.runs for each in group),
        "ends": _ends([each.ends for each in group if each.ends]),
    }


def spread(values: Sequence[float]) -> float | None:
    """Largest / smallest; None if the smallest is not a finite number above 0."""
    smallest = min(values)
    return max(values) / smallest if 0 < smallest < math.inf else None


def _ends(ends: Sequence[dict[str, float]]) -> Row:
    """Mean, standard deviation and range of each hyperparameter, without values that are not finite."""
    entries: Row = {}
    for name in ends[0] if ends else ():
        values = [each[name] for each in ends if each.get(name) is not None]
        if values:
            entries[name] = {
                "mean": statistics.mean(values),
                "deviation": statistics.pstdev(values),
                "smallest": min(values),
                "largest": max(values),
            }
    return entries


def paired_test(found: Sequence[Outcome], other: str) -> Row | None:
    """Wilcoxon's exact signed-rank test of stn's test losses against those of ``other``; None if either is missing.

    Pairs have the same guess and seed. A search has no guess: its pair is the median of the stn runs with its seed.
    ``smallest_p`` is what as many pairs give if stn wins all of them, 2^(1 - pairs). Pairs without a difference are
    left out.
    """
    tuned = [each for each in found if each.method == "stn"]
    against = [each for each in found if each.method == other]
    if not tuned or not against or other == "stn":
        return None
    if other in SEARCHES:
        by_seed = {seed: _median(each.test for each in tuned if each.seed == seed) for seed in {t.seed for t in tuned}}
        pairs = [(by_seed[each.seed], each.test) for each in against if each.seed in by_seed]
    else:
        by_pair = {(each.guess, each.seed): each.test for each in tuned}
        pairs = [(by_pair[key], each.test) for each in against if (key := (each.guess, each.seed)) in by_pair]
    differences = [one - two for one, two in pairs if one != two]
    return {
        "method": other,
        "paired_by": "seed" if other in SEARCHES else "guess and seed",
        "pairs": len(differences),
        "stn_better": sum(difference < 0 for difference in differences),
        "p": signed_rank_p(differences),
        "smallest_p": min(1.0, 2.0 ** (1 - len(differences))),
    }


def signed_rank_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of Wilcoxon's exact signed-rank test of ``differences``, none of which is 0; 1 for none.

    Infinite differences, of runs that became non-finite, have the highest ranks.
    """
    if not differences:
        return 1.0
    with extra("scipy"):
        from scipy.stats import wilcoxon
    beyond = 2 * max((abs(each) for each in differences if math.isfinite(each)), default=1.0)
    ranked = [math.copysign(min(abs(each), beyond), each) for each in differences]
    return float(wilcoxon(ranked, method="exact").pvalue)
