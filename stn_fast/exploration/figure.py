"""The picture of an exploration: a curve for each hyperparameter, and a map of the two that matter most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stn_fast.exploration.response import BAND, Curve, Exploration, Map
from stn_fast.hyperparameter import Hyperparameter
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.plot import COLOURS, COLUMNS, GREY, panels, plain_log_labels, spelt
from stn_fast.terminal import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PANEL = (3.7, 2.6)  # inches
HEAD = 0.75  # inches
MARGIN = 0.15  # of the range of the losses in the bands, above and below
LEVELS = 13  # boundaries between the colours of a map
DECADES = 3e3  # highest / lowest value of a logarithmic axis above which not every power of ten is written out
TICKS = 7  # most values of an integer that are written out
BLUE, RED = COLOURS[:2]


def draw(found: Exploration, space: HyperparameterSpace, title: str, loss_unit: str) -> Figure:
    """A panel for each curve, by descending range, and one for the map.

    All curves have the same range of losses, that within ±2σ; outside they may leave the panel. Values without an upper
    bound, such as those of weight decay, are on a logarithmic axis. Other axes are evenly spaced in unconstrained
    units, and their labels are the values at the ends, at ±2σ and at the run's value.
    """
    count = len(found.curves) + (found.map is not None)
    figure, axes = panels(count, HEAD, PANEL, least_width=2 * PANEL[0])
    limits = _limits([point.loss for curve in found.curves for point in curve.band])
    label = f"validation loss ({printable(loss_unit)})" if loss_unit else "validation loss"
    for number, (axis, curve) in enumerate(zip(axes, found.curves, strict=False)):
        _draw_curve(axis, curve, space[curve.name])
        axis.set_ylim(*limits)
        if number % COLUMNS == 0:
            axis.set_ylabel(label, fontsize=8)
    if found.map is not None:
        curves = {curve.name: curve for curve in found.curves}
        bar = _draw_map(axes[-1], found.map, [curves[name] for name in found.map.names], space)
        bar.set_label(label, fontsize=8)
    _head(figure, title)
    return figure


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of the finite ``losses``, with a margin."""
    finite = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    low, high = min(finite), max(finite)
    margin = MARGIN * (high - low) or 0.01 * (abs(low) or 1.0)
    return low - margin, high + margin


def _draw_curve(axis: Axes, curve: Curve, one: Hyperparameter) -> None:
    """Solid within ±2σ, dashed outside; an integer has a dot for each value."""
    part = "value" if _is_logarithmic(one) else "shift"
    axis.axvspan(getattr(curve.low, part), getattr(curve.high, part), color=BLUE, alpha=0.12, linewidth=0)
    marker = "." if one.integer else ""
    within = [point for point in curve.points if abs(point.shift) <= BAND]
    for points, style, width in ((curve.points, "--", 1.2), (within, "-", 1.8)):
        x, losses = [getattr(point, part) for point in points], [point.loss for point in points]
        axis.plot(x, losses, style, marker=marker, color=BLUE, linewidth=width)
    axis.plot(getattr(curve.here, part), curve.here.loss, "o", color=BLUE, markersize=6, zorder=5)
    lowest = curve.lowest
    axis.plot(getattr(lowest, part), lowest.loss, "D", color=RED, markersize=7, fillstyle="none", zorder=6)
    axis.set_xscale("log" if part == "value" else "linear")
    shifts, values = ([getattr(point, field) for point in curve.points] for field in ("shift", "value"))
    _label(axis.xaxis, one, shifts, values)
    axis.set_title(spelt(curve.name), fontsize=10, loc="left")
    axis.set_title(f"{curve.here.value:.2g}, σ {curve.scale:.2g}", fontsize=8.5, loc="right", color=GREY)
    axis.grid(alpha=0.25, linewidth=0.6)
    _finish(axis)


def _draw_map(axis: Axes, drawn: Map, curves: Sequence[Curve], space: HyperparameterSpace) -> Any:
    """Contours between the extremes within ±2σ of both; other losses have the first or last colour. The colour bar."""
    import numpy as np

    ones = [space[name] for name in drawn.names]
    parts = ["value" if _is_logarithmic(one) else "shift" for one in ones]
    places = [getattr(drawn, f"{part}s")[k] for k, part in enumerate(parts)]
    losses = np.ma.masked_invalid(drawn.losses)
    across, up = (np.abs(shifts) <= BAND for shifts in drawn.shifts)
    in_band = losses[np.ix_(up, across)].compressed().tolist() or [0.0]
    low, high = min(in_band), max(in_band)
    levels = np.linspace(low, high if high > low else low + 1e-6 * (abs(low) or 1.0), LEVELS)
    filled = axis.contourf(*places, losses, levels=levels, cmap="viridis_r", extend="both")
    (left, right), (bottom, top) = (
        [getattr(end, part) for end in (curve.low, curve.high)] for curve, part in zip(curves, parts, strict=True)
    )
    axis.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=RED, linewidth=1.4)
    here = [getattr(curve.here, part) for curve, part in zip(curves, parts, strict=True)]
    axis.plot(*here, "o", color=BLUE, markeredgecolor="white", markersize=7, zorder=5)
    axis.set_xscale("log" if parts[0] == "value" else "linear")
    axis.set_yscale("log" if parts[1] == "value" else "linear")
    for k, labelled in enumerate((axis.xaxis, axis.yaxis)):
        _label(labelled, ones[k], drawn.shifts[k], drawn.values[k])
        labelled.set_label_text(spelt(drawn.names[k]), fontsize=8)
    axis.set_title("the first two together; box: ± 2σ", fontsize=10, loc="left")
    _finish(axis)
    bar = axis.figure.colorbar(filled, ax=axis, pad=0.02, ticks=levels[:: (LEVELS - 1) // 4], format="%.3g")
    bar.ax.tick_params(labelsize=7)
    return bar


def _is_logarithmic(one: Hyperparameter) -> bool:
    """Whether values are positive and have no upper bound, such as those of weight decay."""
    return one.low == 0 and one.high is None and not one.integer


def _label(axis: Axis, one: Hyperparameter, shifts: Sequence[float], values: Sequence[float]) -> None:
    """Sets the ticks of an axis with these ``values`` at ``shifts``, ascending."""
    if _is_logarithmic(one):
        from matplotlib.ticker import LogLocator

        plain_log_labels(axis)
        low, high = axis.get_view_interval()
        if high > DECADES * low:
            axis.set_major_locator(LogLocator(numticks=5))
        return
    written = [*range(0, len(shifts), -(-len(shifts) // TICKS))]
    if not one.integer:
        written = [0, *(k for k, shift in enumerate(shifts) if abs(shift) in (0.0, BAND)), len(shifts) - 1]
    axis.set_ticks([shifts[k] for k in written], [f"{values[k]:.2g}" for k in written])


def _finish(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _head(figure: Figure, title: str) -> None:
    """The title, and a legend of lines and marks."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.2 / height, printable(title), ha="center", va="center", fontsize=12)
    entries: list[tuple[Any, str]] = [
        (Line2D([], [], color=BLUE, linewidth=1.8), "as the response predicts"),
        (Patch(color=BLUE, alpha=0.12), "± 2σ, where it was fitted"),
        (Line2D([], [], color=BLUE, linewidth=1.2, linestyle="--"), "extrapolated"),
        (Line2D([], [], color=BLUE, marker="o", linestyle="none"), "the run's value"),
        (Line2D([], [], color=RED, marker="D", fillstyle="none", linestyle="none"), "lowest within ± 2σ"),
    ]
    handles, labels = zip(*entries, strict=True)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.36 / height), "borderaxespad": 0.0}
    figure.legend(handles, labels, ncols=5 if figure.get_figwidth() > 10 else 3, frameon=False, fontsize=8.5, **place)
