"""Curves and tables: their numbers, computed by hand from a few rows."""

import math
import re

import pytest

from stn_fast.comparison.curves import curve_of, median_curve
from stn_fast.comparison.report import report
from stn_fast.comparison.table import outcomes, paired_test, summarise

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
    assert (low["cpu_seconds"], low["cpu_seconds_of_fixed"], low["examples_of_fixed"]) == (21.0, 21 / 11, 1.0)
    assert (low["step_cpu_seconds"], low["step_cpu_seconds_of_fixed"]) == (10.5, 10.5 / 5.5)
    assert "test_perplexity" not in low


def test_a_search_is_scored_at_its_whole_budget_and_at_the_compute_of_one_stn_run(make_row):
    scores = summarise(compared(make_row))["scores"]
    whole = entry(scores, method="tpe", part="all")
    assert (whole["test_loss"]["median"], whole["cpu_seconds"], whole["examples"]) == (0.35, 30.0, 2200)
    assert whole["valid_loss"]["median"] == pytest.approx(0.4)
    part = entry(scores, method="tpe", part="in CPU s of stn")
    assert (part["test_loss"]["median"], part["cpu_seconds"], part["step_cpu_seconds"]) == (0.95, 21.0, None)


def test_a_search_is_scored_at_the_compute_of_the_steps_of_one_stn_run(make_row):
    rows = [make_row("stn", 0, 0.5, 0.5, cpu=20.0, step_cpu_seconds=18.0), make_row("fixed", 0, 0.5, 0.5)]
    for trial, loss in enumerate((0.9, 0.8, 0.7, 0.6)):
        rows.append(make_row("tpe", 0, loss, loss, trial=trial, cpu=10.0))  # of which steps take 5
    scores = summarise(rows)["scores"]
    assert entry(scores, method="tpe", part="in CPU s of stn")["test_loss"]["median"] == 0.8
    part = entry(scores, method="tpe", part="in step CPU s of stn")
    assert part["test_loss"]["median"] == 0.7
    assert (part["cpu_seconds"], part["step_cpu_seconds"], part["step_cpu_seconds_of_fixed"]) == (None, 18.0, 3.6)


def test_methods_are_compared_over_all_guesses_and_seeds(make_row):
    methods = summarise(compared(make_row))["methods"]
    stn, fixed = entry(methods, method="stn"), entry(methods, method="fixed")
    assert stn["spread_of_test_loss"] == pytest.approx(1.0 / 0.4)
    assert stn["test_loss"] == {"median": pytest.approx(0.65), "smallest": 0.4, "largest": 1.0}
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
    (method,) = summary["methods"]
    assert method["spread_of_test_perplexity"] == pytest.approx(math.exp(2))
    assert method["test_perplexity"]["smallest"] == pytest.approx(math.exp(3))
    assert f"{(math.exp(3) + math.exp(5)) / 2:.4g}" in report(summary)


def test_runs_are_paired_by_seed_and_each_method_has_its_median_over_guesses(make_row):
    found = outcomes(compared(make_row))
    fixed, tpe = paired_test(found, "stn", "fixed"), paired_test(found, "stn", "tpe")
    # Medians over guesses: of stn .65, .5 and .85, of fixed 1.3, 1.3 and 1.55, of the search .35.
    assert (fixed["pairs"], fixed["reference_better"], fixed["p"], fixed["smallest_p"]) == (3, 3, 0.25, 0.25)
    assert (tpe["pairs"], tpe["reference_better"], tpe["p"], tpe["smallest_p"]) == (3, 0, 0.25, 0.25)


def test_seeds_that_became_non_finite_by_both_methods_are_left_out(make_row):
    rows = [make_row(method, 0, None, None, diverged="nan") for method in ("stn", "fixed")]
    rows += [make_row(method, seed, 1.0, loss) for method, loss in (("stn", 1.0), ("fixed", 2.0)) for seed in (1, 2)]
    (test,) = summarise(rows)["tests"]
    assert (test["pairs"], test["reference_better"], test["p"]) == (2, 2, 0.5)


def test_every_self_tuned_method_is_a_reference(make_row):
    methods = ("delta-stn", "stn", "fixed")
    rows = [make_row(name, 0, 0.5, loss, cpu=20 - loss) for loss, name in enumerate(methods)]
    rows += [make_row("tpe", 0, 0.5, 0.5, trial=trial, cpu=15.0) for trial in range(2)]
    summary = summarise(rows)
    tested = {(test["reference"], test["method"]) for test in summary["tests"]}
    assert tested == {(one, other) for one in ("stn", "delta-stn") for other in ("fixed", "tpe")} | {
        ("stn", "delta-stn")
    }
    assert len(summary["tests"]) == len(tested)
    parts = {each["part"]: each["cpu_seconds"] for each in summary["scores"] if each["method"] == "tpe"}
    assert (parts["in CPU s of stn"], parts["in CPU s of delta-stn"]) == (19.0, 20.0)
    only = summarise([row for row in rows if row["method"] != "stn"])
    assert {test["reference"] for test in only["tests"]} == {"delta-stn"}
    assert not [each for each in only["scores"] if each["part"].endswith(" of stn")]


def test_the_report_names_both_methods_of_a_test_and_all_costs(make_row):
    said = report(summarise(compared(make_row)))
    assert "CPU s  x fixed  steps x fixed  examples x fixed" in said
    assert "in step CPU s of stn" in said
    assert re.search(r"^stn +tpe +3 +0 +0.25 +0.25$", said, flags=re.MULTILINE)
