"""The best validation loss of a run or a search so far, and the test loss there, over the CPU time that it has used."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from stn_fast.comparison.kept_runs import Row


@dataclass(frozen=True)
class Curve:
    """Steps of a run or a search: after ``seconds[i]`` of CPU time, the best validation loss was ``valid[i]``.

    ``test`` are the test losses at these, and ``end`` is the whole CPU time. A run that is not ``finite`` ended with a
    loss or gradient that was not, and so has an infinite loss from then on.
    """

    seconds: tuple[float, ...]
    valid: tuple[float, ...]
    test: tuple[float, ...]
    end: float
    finite: bool = True

    def at(self, seconds: float) -> tuple[float, float]:
        """(validation loss, test loss) of the best evaluation until ``seconds``; infinite before the first one."""
        place = bisect_right(self.seconds, seconds) - 1
        if place < 0 or (not self.finite and seconds >= self.end):
            return math.inf, math.inf
        return self.valid[place], self.test[place]


def curve_of(rows: Sequence[Row], clock: str = "cpu_seconds") -> Curve:
    """The curve of a run, a single row, or of a search, the rows of its trials in order.

    ``clock`` is ``cpu_seconds`` or, for the CPU time of steps, ``step_cpu_seconds``. A trial that became non-finite
    only adds its time.
    """
    seconds: list[float] = []
    best: list[tuple[float, float]] = []
    before, is_search = 0.0, rows[0]["trial"] is not None
    for row in rows:
        if not (row["diverged"] and is_search):
            curve = row["curve"]
            for cpu, valid, test in zip(curve[clock], curve["valid_loss"], curve["test_loss"], strict=True):
                if valid is not None and (not best or valid < best[-1][0]):
                    seconds.append(before + cpu)
                    best.append((valid, math.inf if test is None else test))
        before += row[clock]
    finite = is_search or not rows[0]["diverged"]
    return Curve(tuple(seconds), tuple(v for v, _ in best), tuple(t for _, t in best), before, finite)


def median_curve(curves: Sequence[Curve]) -> Curve:
    """The median of the validation losses and that of the test losses over ``curves``.

    It begins where both are finite for the first time; where most runs have become non-finite, it is infinite.
    """
    moments = sorted({moment for curve in curves for moment in (*curve.seconds, curve.end)})
    points: list[tuple[float, float, float]] = []
    for moment in moments:
        losses = [curve.at(moment) for curve in curves]
        valid, test = (statistics.median(column) for column in zip(*losses, strict=True))
        if points or (math.isfinite(valid) and math.isfinite(test)):
            points.append((moment, valid, test))
    seconds, valids, tests = (tuple(column) for column in zip(*points, strict=True)) if points else ((), (), ())
    return Curve(seconds, valids, tests, max(curve.end for curve in curves))
