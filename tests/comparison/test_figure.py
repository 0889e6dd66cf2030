"""The figure: a line for every run and search, a bold one for every method, in one colour."""

import math

import pytest

from stn_fast import plot
from stn_fast.comparison.figure import draw
from stn_fast.comparison.table import perplexity

CURVE = [(1.0, 3.0, 3.1), (2.0, 1.0, 1.2), (3.0, 2.0, 0.1)]


def lines(axis, bold):
    return [line for line in axis.get_lines() if (line.get_linewidth() > 2) == bold and len(line.get_xdata()) > 1]


@pytest.fixture
def rows(make_row):
    runs = [("stn", guess, seed) for guess in ("low", "high") for seed in range(3)] + [("fixed", "low", 0)]
    found = [make_row(method, seed, 1.0, 1.2, guess=guess, curve=CURVE) for method, guess, seed in runs]
    trials = [(seed, trial) for seed in range(2) for trial in range(2)]
    return found + [make_row("tpe", s, 1.0, 1.2, trial=trial, curve=CURVE, cpu=4.0) for s, trial in trials]


def test_every_run_and_search_has_a_thin_line_and_every_method_a_bold_one(rows, tmp_path):
    figure = draw("digits", rows)
    for axis in figure.axes:
        assert len(lines(axis, bold=False)) == 6 + 1 + 2
        assert len(lines(axis, bold=True)) == 3
        colours = {line.get_color() for line in lines(axis, bold=False)}
        assert colours == {line.get_color() for line in lines(axis, bold=True)}
        assert len(colours) == 3
    (legend,) = figure.legends
    assert {line.get_color() for line in legend.get_lines()} == colours
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["stn: 6 runs", "fixed: 1 runs", "tpe: 2 searches of 2 trials"]
    assert figure.axes[0].get_ylabel() == "loss (nats)"
    assert plot.save(figure, tmp_path / "x.png").stat().st_size > 10_000


def test_the_panels_show_the_best_so_far_over_all_trials(rows):
    valid, test = draw("digits", rows).axes
    (search, *_) = [line for line in lines(valid, bold=False) if line.get_xdata()[-1] == 8.0]
    assert list(search.get_xdata()) == [1.0, 2.0, 8.0]
    assert list(search.get_ydata()) == [3.0, 1.0, 1.0]
    (search, *_) = [line for line in lines(test, bold=False) if line.get_xdata()[-1] == 8.0]
    assert list(search.get_ydata()) == [3.1, 1.2, 1.2]


def test_a_run_that_became_non_finite_ends_with_a_cross(rows, make_row):
    rows.append(make_row("stn", 7, None, None, cpu=5.0, curve=CURVE, diverged="nan"))
    for axis, last in zip(draw("digits", rows).axes, (1.0, 1.2), strict=True):
        (cross,) = [line for line in axis.get_lines() if line.get_marker() == "x"]
        assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (5.0, last)


def test_the_bold_line_ends_where_most_runs_have_become_non_finite(make_row):
    ends = [(4.0, "nan"), (6.0, "nan"), (9.0, None)]
    rows = [make_row("stn", seed, 1, 1, cpu=end, curve=CURVE, diverged=why) for seed, (end, why) in enumerate(ends)]
    for axis, last in zip(draw("digits", rows).axes, (1.0, 1.2), strict=True):
        (bold,) = lines(axis, bold=True)
        shown = [(x, y) for x, y in zip(bold.get_xdata(), bold.get_ydata(), strict=True) if math.isfinite(y)]
        assert shown[-1] == (4.0, last)
        assert min(x for x, y in zip(bold.get_xdata(), bold.get_ydata(), strict=True) if math.isnan(y)) == 6.0


def test_the_figure_of_a_text_shows_perplexities(rows):
    axis = draw("ptb", [{**row, "test_perplexity": 1.0} for row in rows]).axes[0]
    assert axis.get_ylabel() == "perplexity"
    assert lines(axis, bold=False)[0].get_ydata()[0] == perplexity(3.0)


def test_a_comparison_in_which_everything_became_non_finite_is_drawn(make_row, tmp_path):
    rows = [make_row("stn", 0, None, None, curve=[], diverged="nan", loss_unit="")]
    plot.save(draw("digits", rows), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
