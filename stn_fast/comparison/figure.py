"""The figure of a comparison: best validation loss and the test loss there, over CPU time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stn_fast.comparison.curves import Curve, median_curve
from stn_fast.comparison.kept_runs import Row
from stn_fast.comparison.runs import METHODS
from stn_fast.comparison.search import SEARCHES
from stn_fast.comparison.table import Outcome, outcomes, perplexity
from stn_fast.plot import GREY, colour_of, new_figure, plain_log_labels
from stn_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (10.0, 4.8)  # inches
HEAD = 0.16  # share of the height
ORDER = (*METHODS, *SEARCHES)  # of colours, so that a method has the same one in every figure
NOTE = "thin: every run and search    bold: median over guesses and seeds, while finite    cross: became non-finite"


def draw(recipe: str, rows: Sequence[Row]) -> Figure:
    """Two panels. A search's line goes through its trials in order; perplexities take the place of a text's losses."""
    found = outcomes(rows)
    is_text = any("test_perplexity" in row for row in rows)
    unit = next((row["loss_unit"] for row in rows if row["loss_unit"]), "")
    measure = "perplexity" if is_text else "loss"
    figure = new_figure(*SIZE)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - HEAD), w_pad=0.1, h_pad=0.08)
    panels = figure.subplots(1, 2, sharey=True)
    titles = (f"best validation {measure}", f"test {measure} there")
    for axis, part, title in zip(panels, ("valid", "test"), titles, strict=True):
        _panel(axis, found, part, perplexity if is_text else lambda loss: loss)
        axis.set_title(title, fontsize=10, loc="left")
    panels[0].set_ylabel(measure if is_text or not unit else f"{measure} ({printable(unit)})", fontsize=9)
    _head(figure, recipe, found)
    return figure


def _panel(axis: Axes, found: Sequence[Outcome], part: str, transform: Callable[[float], float]) -> None:
    drawn: list[float] = []
    for method in ORDER:
        curves = [each.curve for each in found if each.method == method]
        if not curves:
            continue
        colour = colour_of(ORDER.index(method))
        for curve in curves:
            drawn += _line(axis, curve, part, transform, color=colour, linewidth=0.8, alpha=0.45)
            if not curve.finite and curve.seconds:
                axis.plot(curve.end, transform(getattr(curve, part)[-1]), "x", color=colour, markersize=6)
        drawn += _line(axis, median_curve(curves), part, transform, color=colour, linewidth=2.4)
    axis.set_xscale("log")
    if all(value > 0 for value in drawn):
        axis.set_yscale("log")
        plain_log_labels(axis.yaxis)
    plain_log_labels(axis.xaxis)
    axis.set_xlabel("CPU seconds", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8, labelleft=True)


def _line(axis: Axes, curve: Curve, part: str, transform: Callable[[float], float], **style: Any) -> Sequence[float]:
    """Draws the steps of a curve to its end, without those that are infinite, and returns the finite values."""
    values = [transform(loss) for loss in getattr(curve, part)]
    shown = [value if math.isfinite(value) else math.nan for value in values]
    if shown:
        axis.plot([*curve.seconds, curve.end], [*shown, shown[-1]], drawstyle="steps-post", **style)
    return [value for value in shown if math.isfinite(value)]


def _head(figure: Figure, recipe: str, found: Sequence[Outcome]) -> None:
    """A title, a legend of methods and a line that explains them."""
    from matplotlib.lines import Line2D

    methods = [method for method in ORDER if any(each.method == method for each in found)]
    handles = [Line2D([], [], color=colour_of(ORDER.index(method)), linewidth=2.4) for method in methods]
    labels = [_label(method, [each for each in found if each.method == method]) for method in methods]
    figure.text(0.5, 0.965, f"{printable(recipe)}: the best so far", ha="center", va="center", fontsize=12)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.95), "borderaxespad": 0.0}
    figure.legend(handles, labels, ncols=min(4, len(methods)), frameon=False, fontsize=8.5, **place)
    figure.text(0.5, 1 - HEAD, NOTE, ha="center", va="center", fontsize=8, color=GREY)


def _label(method: str, group: Sequence[Outcome]) -> str:
    if method in SEARCHES:
        return f"{method}: {len(group)} searches of {group[0].runs} trials"
    return f"{method}: {len(group)} runs"
