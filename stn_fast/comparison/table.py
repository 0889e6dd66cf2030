"""The numbers of a comparison: medians and ranges, spreads, ends of hyperparameters, and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stn_fast.comparison.curves import Curve, curve_of
from stn_fast.comparison.kept_runs import Row
from stn_fast.comparison.plan import groups
from stn_fast.comparison.ranks import signed_rank_p
from stn_fast.comparison.runs import SELF_TUNED, score
from stn_fast.comparison.search import SEARCHES

COST = ("cpu_seconds", "step_cpu_seconds", "examples")  # fields of an outcome


@dataclass(frozen=True)
class Outcome:
    """A finished run, or a search with all of its trials.

    ``valid`` and ``test`` are losses at the lowest validation loss, infinite for a run that became non-finite.
    ``step_cpu_seconds`` is the CPU time of training and validation steps, and ``examples`` counts those that these have
    read. ``ends`` are the final hyperparameters, for a search those of its best trial. ``not_finite`` of the ``runs``
    became non-finite. ``curve`` is over CPU time, ``step_curve`` over that of steps.
    """

    method: str
    guess: str | None
    seed: int
    valid: float
    test: float
    cpu_seconds: float
    step_cpu_seconds: float
    examples: int
    ends: dict[str, float]
    runs: int
    not_finite: int
    curve: Curve
    step_curve: Curve


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
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
        step_cpu_seconds=sum(row["step_cpu_seconds"] for row in rows),
        examples=sum(row["train_examples"] + row["valid_examples"] for row in rows),
        ends=best.get("hyperparameters_end", {}),
        runs=len(rows),
        not_finite=sum(row["diverged"] is not None for row in rows),
        curve=curve_of(rows),
        step_curve=curve_of(rows, "step_cpu_seconds"),
    )


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the printed table says, from all ``rows`` of a comparison.

    ``scores``: one entry for every method and guess; for a search, also what it had found in the median CPU time of a
    self-tuned run, and in the median CPU time of such a run's steps. ``methods``: spread, counts and ends of every
    method over all guesses and seeds. ``tests``: those of `paired_tests`.
    """
    found = outcomes(rows)
    is_text = any("test_perplexity" in row for row in rows)
    return {
        "scores": list(_scores(found, perplexity if is_text else None)),
        "methods": [_method(method, found, perplexity if is_text else None) for method in _methods(found)],
        "tests": paired_tests(found),
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite if that is too large for a float."""
    return math.exp(loss) if loss < 709 else math.inf


def _methods(found: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(each.method for each in found))


def _scores(found: Sequence[Outcome], transform: Callable[[float], float] | None) -> Iterable[Row]:
    fixed = [each for each in found if each.method == "fixed"]
    for method, guess in dict.fromkeys((each.method, each.guess) for each in found):
        group = [each for each in found if (each.method, each.guess) == (method, guess)]
        own = {"method": method, "guess": guess, "seeds": len(group), "trials": group[0].runs}
        losses = [(each.valid, each.test) for each in group]
        spent = {name: _median(getattr(each, name) for each in group) for name in COST}
        yield {**own, "part": "all", **_losses(losses, transform), **_cost(spent, fixed)}
        for part, losses, spent in _parts(group, found) if method in SEARCHES else ():
            yield {**own, "part": part, **_losses(losses, transform), **_cost(spent, fixed)}


def _parts(
    search: Sequence[Outcome], found: Sequence[Outcome]
) -> Iterable[tuple[str, list[tuple[float, float]], dict[str, float]]]:
    """What a search had found in the median CPU time of a run of each self-tuned method, and in that of its steps.

    Yields (name of this part, losses for each seed, what they cost).
    """
    for reference in SELF_TUNED:
        tuned = [each for each in found if each.method == reference]
        for name, curve, unit in (("cpu_seconds", "curve", "CPU s"), ("step_cpu_seconds", "step_curve", "step CPU s")):
            if tuned:
                limit = _median(getattr(each, name) for each in tuned)
                losses = [getattr(each, curve).at(limit) for each in search]
                spent = _median(min(limit, getattr(each, name)) for each in search)
                yield f"in {unit} of {reference}", losses, {name: spent}


def _losses(losses: Sequence[tuple[float, float]], transform: Callable[[float], float] | None) -> Row:
    """The ranges of validation and test losses, and of their perplexities by ``transform``."""
    entry: Row = {}
    for name, values in zip(("valid", "test"), zip(*losses, strict=True), strict=True):
        entry[f"{name}_loss"] = _range(values)
        if transform is not None:
            entry[f"{name}_perplexity"] = _range([transform(value) for value in values])
    return entry


def _cost(spent: Mapping[str, float], fixed: Sequence[Outcome]) -> Row:
    """Each of ``COST``, also as a multiple of the median of a fixed run; None for those that ``spent`` lacks."""
    entry: Row = {}
    for name in COST:
        base = [getattr(each, name) for each in fixed]
        entry[name] = spent.get(name)
        entry[f"{name}_of_fixed"] = ratio(spent[name], base) if name in spent else None
    return entry


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
    entry: Row = {"method": method}
    for name, unit in (("test_loss", lambda loss: loss), ("test_perplexity", transform)):
        if unit is not None:
            scores = [unit(each.test) for each in group]
            entry |= {name: _range(scores), f"spread_of_{name}": spread(scores)}
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


def paired_tests(found: Sequence[Outcome]) -> list[Row]:
    """The tests of every self-tuned method against every other one; of two self-tuned ones, once."""
    methods = _methods(found)
    tests = []
    for number, reference in enumerate(SELF_TUNED):
        others = [method for method in methods if method not in SELF_TUNED[: number + 1]]
        tests += [paired_test(found, reference, other) for other in others if reference in methods]
    return tests


def paired_test(found: Sequence[Outcome], reference: str, other: str) -> Row:
    """Wilcoxon's exact signed-rank test of the test losses of ``reference`` against those of ``other``.

    Pairs have the same seed. From several guesses, a method's loss is the median over them: runs with one seed share
    data order and first weights, so that each of them is no evidence of its own. ``smallest_p`` is what as many pairs
    give if the reference wins all of them, 2^(1 - pairs). Pairs without a difference are left out.
    """
    own, others = _by_seed(found, reference), _by_seed(found, other)
    pairs = [(own[seed], others[seed]) for seed in own if seed in others]
    differences = [one - two for one, two in pairs if one != two]
    return {
        "reference": reference,
        "method": other,
        "pairs": len(differences),
        "reference_better": sum(difference < 0 for difference in differences),
        "p": signed_rank_p(differences),
        "smallest_p": min(1.0, 2.0 ** (1 - len(differences))),
    }


def _by_seed(found: Sequence[Outcome], method: str) -> dict[int, float]:
    """The median test loss of ``method`` over its guesses for each seed; a search has one loss for each."""
    group = [each for each in found if each.method == method]
    return {seed: _median(e.test for e in group if e.seed == seed) for seed in sorted({e.seed for e in group})}
