"""Curves and tables: their numbers, computed by hand from a few rows."""

import itertools
import math

import pytest

from stn_fast.comparison.curves import curve_of, median_curve
from stn_fast.comparison.report import report
from stn_fast.comparison.table import outcomes, paired_test, signed_rank_p, summarise

POINTS = [[(1.0, 3.0, 3.1), (2.0, 1.0, 1.2), (3.0, 2.0, 0.1)], [(1.0, 4.0, 4.1), (2.0, 0.5, 0.7)]]


def test_the_curve_of_a_run_is_its_best_validation_loss_and_the_test_loss_there(make_row):
    curve = curve_of([make_row("stn", 0, 1.0, 1.2, cpu=4.0, curve=POINTS[0])])
    assert (curve.seconds, curve.valid, curve.test, curve.end) == ((1.0, 2.0), (3.0, 1.0), (3.1, 1.2), 4.0)
    assert [curve.at(seconds) for seconds in (1.0, 1.9, 9.0)] == [(3.0, 3.1), (3.0, 3.1), (1.0, 1.2)]
    assert curve.at(0.5) == (math.inf, math.inf)


def test_the_curve_of_a_search_goes_through_its_trials_and_counts_those_that_became_non_finite(make_row):
    rows = [
        make_row("tpe", 0, 1.0, 1.2, trial=0, cpu=4.0, curve=POINTS[0]),
        make_row("tpe", 0, None, None, trial=1, cpu=5.0, curve=[(1.0, 0.1, 0.1)], diverged="nan"),
        make_row("tpe", 0, 0.5, 0.7, trial=2, cpu=3.0, curve=POINTS[1]),
    ]
    curve = curve_of(rows)
    assert (curve.seconds, curve.valid, curve.test) == ((1.0, 2.0, 11.0), (3.0, 1.0, 0.5), (3.1, 1.2, 0.7))
    assert curve.end == 12.0
    assert curve.finite


def test_a_run_that_became_non_finite_has_an_infinite_loss_from_then_on(make_row):
    curve = curve_of([make_row("stn", 0, None, None, cpu=4.0, curve=POINTS[0], diverged="nan")])
    assert curve.at(3.9) == (1.0, 1.2)
    assert curve.at(4.0) == (math.inf, math.inf)


def test_the_median_curve_begins_where_most_have_begun_and_keeps_the_best_of_those_that_ended(make_row):
    ends = [((1.0, 4.0, 40.0), 1.5), ((2.0, 2.0, 20.0), 2.5), ((3.0, 3.0, 30.0), 9.0)]
    curves = [curve_of([make_row("stn", 0, 1, 1, cpu=end, curve=[point])]) for point, end in ends]
    median = median_curve(curves)
    assert (median.seconds[0], median.valid[0], median.test[0]) == (2.0, 4.0, 40.0)
    assert (median.valid[-1], median.test[-1], median.end) == (3.0, 30.0, 9.0)


def test_the_median_curve_is_infinite_where_most_runs_have_become_non_finite(make_row):
    ends = [(4.0, "nan"), (6.0, "nan"), (9.0, None)]
    curves = [curve_of([make_row("stn", 0, 1, 1, cpu=end, curve=POINTS[1], diverged=why)]) for end, why in ends]
    median = median_curve(curves)
    assert (median.seconds, median.end) == ((1.0, 2.0, 4.0, 6.0, 9.0), 9.0)
    assert median.valid == (4.0, 0.5, 0.5, math.inf, math.inf)
    assert median.test == (4.1, 0.7, 0.7, math.inf, math.inf)


def compared(make_row):
    """stn and fixed from two guesses with three seeds, and a search of two trials for each seed."""
    tests = {
        ("stn", "low"): [0.5, 0.6, 0.7],
        ("stn", "high"): [0.8, 0.4, 1.0],
        ("fixed", "low"): [0.6, 0.5, 0.9],
        ("fixed", "high"): [2.0, 2.1, 2.2],
    }
    cpu = {"stn": 20.0, "fixed": 10.0}
    rows = [
        make_row(method, seed, test - 0.1, test, guess=guess, cpu=cpu[method] + seed)
        for (method, guess), column in tests.items()
        for seed, test in enumerate(column)
    ]
    for seed in range(3):
        rows.append(make_row("tpe", seed, 0.9, 0.95, trial=0, cpu=15.0))
        rows.append(make_row("tpe", seed, 0.3 + seed / 10, 0.35, trial=1, cpu=15.0))
    return rows


def entry(entries, **match):
    (found,) = [each for each in entries if match.items() <= each.items()]
    return found


def test_scores_are_medians_and_ranges_over_seeds_and_multiples_of_a_fixed_run(make_row):
    scores = summarise(compared(make_row))["scores"]
    low = entry(scores, method="stn", guess="low")
    assert low["test_loss"] == {"median": 0.6, "smallest": 0.5, "largest": 0.7}
    assert low["valid_loss"]["median"] == pytest.approx(0.5)
    assert (low["cpu_seconds"], low["cpu_of_fixed"], low["examples_of_fixed"]) == (21.0, 21 / 11, 1.0)
    assert "test_perplexity" not in low


def test_a_search_is_scored_at_its_whole_budget_and_at_the_compute_of_one_stn_run(make_row):
    scores = summarise(compared(make_row))["scores"]
    whole = entry(scores, method="tpe", part="all")
    assert (whole["test_loss"]["median"], whole["cpu_seconds"], whole["examples"]) == (0.35, 30.0, 2200)
    assert whole["valid_loss"]["median"] == pytest.approx(0.4)
    part = entry(scores, method="tpe", part="in the CPU time of one stn run")
    assert (part["test_loss"]["median"], part["cpu_seconds"]) == (0.95, 21.0)


def test_methods_are_compared_over_all_guesses_and_seeds(make_row):
    methods = summarise(compared(make_row))["methods"]
    stn, fixed = entry(methods, method="stn"), entry(methods, method="fixed")
    assert stn["spread_of_test_loss"] == pytest.approx(1.0 / 0.4)
    assert (stn["worse_than_fixed"], stn["compared_with_fixed"], stn["not_finite"], stn["runs"]) == (1, 6, 0, 6)
    assert fixed["worse_than_fixed"] is None
    ends = stn["ends"]["dropout"]
    assert (ends["smallest"], ends["largest"]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert ends["mean"] == pytest.approx(3.4 / 6)
    squares = [(end - 3.4 / 6) ** 2 for end in (0.4, 0.5, 0.6, 0.7, 0.3, 0.9)]
    assert ends["deviation"] == pytest.approx(math.sqrt(sum(squares) / 6))


def test_a_run_as_good_as_fixed_is_not_worse(make_row):
    rows = [make_row(method, seed, 0.5, 0.5) for method in ("stn", "fixed") for seed in range(2)]
    summary = summarise(rows)
    assert entry(summary["methods"], method="stn")["worse_than_fixed"] == 0
    (test,) = summary["tests"]
    assert (test["pairs"], test["p"], test["smallest_p"]) == (0, 1.0, 1.0)


def test_runs_that_became_non_finite_are_counted_and_have_an_infinite_loss(make_row):
    rows = compared(make_row)
    rows[0] = make_row("stn", 0, None, None, guess="low", diverged="nan")
    rows[-1] = make_row("tpe", 2, None, None, trial=1, diverged="nan")
    summary = summarise(rows)
    stn, tpe = entry(summary["methods"], method="stn"), entry(summary["methods"], method="tpe")
    assert (stn["not_finite"], stn["worse_than_fixed"], stn["spread_of_test_loss"]) == (1, 2, math.inf)
    assert (tpe["not_finite"], tpe["runs"]) == (1, 6)
    assert entry(summary["scores"], method="tpe", part="all")["test_loss"]["largest"] == 0.95
    assert "inf" in report(summary)


def test_perplexities_stand_beside_the_losses_of_a_text(make_row):
    rows = [make_row("stn", seed, 2.0, loss, test_perplexity=1.0) for seed, loss in enumerate((3.0, 5.0))]
    summary = summarise(rows)
    (score,) = summary["scores"]
    assert score["test_perplexity"]["median"] == pytest.approx((math.exp(3) + math.exp(5)) / 2)
    assert score["test_loss"]["median"] == 4.0
    assert summary["methods"][0]["spread_of_test_perplexity"] == pytest.approx(math.exp(2))
    assert f"{(math.exp(3) + math.exp(5)) / 2:.4g}" in report(summary)


def test_stn_is_paired_by_guess_and_seed_and_with_searches_by_seed(make_row):
    found = outcomes(compared(make_row))
    fixed, tpe = paired_test(found, "fixed"), paired_test(found, "tpe")
    assert (fixed["pairs"], fixed["stn_better"], fixed["paired_by"]) == (6, 5, "guess and seed")
    assert fixed["smallest_p"] == pytest.approx(2 / 2**6)
    # The medians of stn over guesses, .65, .5 and .85, are all above the search's .35.
    assert (tpe["pairs"], tpe["stn_better"], tpe["p"], tpe["smallest_p"]) == (3, 0, 0.25, 0.25)
    assert paired_test(found, "random") is None


def exact_p(differences):
    """The definition: how many of all choices of signs give a rank sum as far from its mean."""
    ranks = [sorted(map(abs, differences)).index(abs(each)) + 1 for each in differences]
    middle = sum(ranks) / 2
    seen = abs(sum(rank for rank, each in zip(ranks, differences, strict=True) if each > 0) - middle)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(ranks))]
    return sum(abs(each - middle) >= seen for each in sums) / len(sums)


@pytest.mark.parametrize(
    "differences", [[-0.1, -0.2, -0.3], [0.5, -0.1, 0.2, -0.4, 1.0], [-3, -2, -1, -7, 0.5, -6, 4, -9]]
)
def test_p_is_that_of_all_choices_of_signs(differences):
    assert signed_rank_p(differences) == pytest.approx(exact_p(differences))


def test_an_infinite_difference_has_the_highest_rank():
    assert signed_rank_p([-1.0, 2.0, -3.0, -4.0, math.inf]) == pytest.approx(exact_p([-1.0, 2.0, -3.0, -4.0, 9.0]))
    assert signed_rank_p([]) == 1.0
