"""The table, the page and the numbers of an exploration."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stn_fast.exploration.response import Curve, Exploration, Point
from stn_fast.terminal import aligned, printable

HEADS = (
    "hyperparameter", "value", "σ", "loss at -2σ", "here", "at +2σ", "range", "slope", "curvature", "lowest", "at",
)  # fmt: skip
UNITS = (
    "By descending range, the difference of the highest and the lowest loss within ±2σ. σ is in unconstrained units\n"
    "λ, slope is dF/dλ by autograd, curvature d²F/dλ² of a parabola fitted within ±2σ, lowest the lowest loss there."
)
HOW_TO_READ = (
    "A self-tuning network has learnt how its weights would change with its hyperparameters. Each curve is the "
    "validation loss of the network when one hyperparameter is moved and the weights change as this response "
    "predicts; all others stay where they are. Nothing was trained to draw it. Where a curve is flat, the "
    "hyperparameter hardly matters; where it descends, tuning moves the hyperparameter downhill; the lowest point is "
    "the response's guess of the best value. The limits: dropout, noise, augmentation and penalties act on training "
    "only, so that the loss changes only because the weights do, and a curve is no better than the response. It was "
    "fitted to perturbations of standard deviation σ and can be trusted, if at all, inside the shaded band of ±2σ; "
    "outside, it extrapolates. It shows what the run goes by when it tunes, near its present weights, and not where a "
    "whole training run with other values would arrive, which may even be the opposite. The map shows two "
    "hyperparameters moved together; its box is ±2σ of both."
)
STYLE = (
    "body{font-family:sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:.9rem}th,td{padding:.25rem .6rem;text-align:right;"
    "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}"
)


def cells(curve: Curve) -> list[str]:
    """A row of the table."""
    losses = [f"{point.loss:.4f}" for point in (curve.low, curve.here, curve.high)]
    rest = [f"{number:.2g}" for number in (curve.range, curve.slope, curve.curvature)]
    where = [f"{curve.lowest.loss:.4f}", f"{curve.lowest.value:.3g}"]
    return [printable(curve.name), f"{curve.here.value:.3g}", f"{curve.scale:.2g}", *losses, *rest, *where]


def table(curves: Sequence[Curve]) -> str:
    """A line for each hyperparameter, and what the columns are."""
    return f"{UNITS}\n\n{aligned(HEADS, [cells(curve) for curve in curves], left=1)}"


def page(title: str, about: str, curves: Sequence[Curve], picture: bytes) -> str:
    """An HTML page that needs no other file: how to read it, the picture and the table."""

    def row(tag: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    title = html.escape(printable(title))
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>\n<p>{html.escape(printable(about))}</p>\n<p>{html.escape(HOW_TO_READ)}</p>",
            f'<img src="{source}" alt="The validation loss against each hyperparameter; the table has the numbers">',
            f"<p>{html.escape(UNITS)}</p>\n<table>",
            row("th", HEADS),
            *(row("td", cells(curve)) for curve in curves),
            "</table></body></html>\n",
        ]
    )


def numbers(found: Exploration) -> dict[str, Any]:
    """Everything that was found, as JSON can hold it."""
    return {
        "loss": found.loss,
        "examples": found.examples,
        "validation_examples": found.validation_examples,
        "hyperparameters": [_numbers_of(curve) for curve in found.curves],
        "map": None if found.map is None else asdict(found.map),
    }


def _numbers_of(curve: Curve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "scale": curve.scale,
        "here": curve.here._asdict(),
        "low": curve.low._asdict(),
        "high": curve.high._asdict(),
        "lowest": curve.lowest._asdict(),
        "range": curve.range if math.isfinite(curve.range) else None,
        "slope": curve.slope,
        "curvature": curve.curvature,
        "curve": {field: [getattr(point, field) for point in curve.points] for field in Point._fields},
    }
