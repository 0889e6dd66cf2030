"""Validation losses that the response of a network predicts at other hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stn_fast.data import Split
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperBatch
from stn_fast.training.batches import IndependentExamples
from stn_fast.training.methods import SelfTuning
from stn_fast.training.parameters import hold_parameters
from stn_fast.training.trainer import Trainer

BAND = 2.0  # σ on either side of the location: where most perturbations of training were, so that the response fits


class Point(NamedTuple):
    """The validation loss at λ + shift·σ, and the constrained value there."""

    shift: float
    value: float
    loss: float


@dataclass(frozen=True)
class Curve:
    """The validation loss along one hyperparameter, with all others at the location.

    Attributes:
        scale: σ, in unconstrained units.
        here, low, high: the points at λ, λ − 2σ and λ + 2σ.
        points: the curve, by ascending shift.
        slope: dF/dλ at λ by autograd, in units of the loss.
    """

    name: str
    scale: float
    here: Point
    low: Point
    high: Point
    points: Sequence[Point]
    slope: float

    @property
    def band(self) -> list[Point]:
        """All points within ±2σ, by ascending shift."""
        inside = [point for point in self.points if abs(point.shift) <= BAND]
        return sorted({point.shift: point for point in (*inside, self.low, self.here, self.high)}.values())

    @property
    def range(self) -> float:
        """Highest minus lowest loss within ±2σ; infinite if one is not finite."""
        losses = [point.loss for point in self.band]
        return max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.inf

    @property
    def lowest(self) -> Point:
        """The point with the lowest loss within ±2σ."""
        return min(self.band, key=lambda point: point.loss if math.isfinite(point.loss) else math.inf)

    @property
    def curvature(self) -> float:
        """d²F/dλ² of the parabola with the smallest squared errors within ±2σ; NaN if a loss is not finite."""
        shifts, losses = (np.array(column) for column in zip(*((p.shift, p.loss) for p in self.band), strict=True))
        if not np.isfinite(losses).all():
            return math.nan
        return float(2 * np.polyfit(shifts, losses, 2)[0]) / self.scale**2


@dataclass(frozen=True)
class Map:
    """The validation loss over two hyperparameters: ``losses[i][j]`` at the i-th place of the second one.

    Places are given by shifts in multiples of σ, and by constrained values; j counts those of the first one.
    """

    names: tuple[str, str]
    shifts: tuple[list[float], list[float]]
    values: tuple[list[float], list[float]]
    losses: list[list[float]]


@dataclass(frozen=True)
class Exploration:
    """The validation loss at the location, the curves by descending range, and the map of the first two.

    ``examples`` of the ``validation_examples`` were evaluated.
    """

    loss: float
    examples: int
    validation_examples: int
    curves: Sequence[Curve]
    map: Map | None


class Response:
    """The validation loss of a trainer's network at any hyperparameters, on ``examples`` of its validation examples.

    Evaluations are those of the trainer: on folded weights, in evaluation mode and without penalties. So the loss
    changes only because the weights respond, and where the network itself reads a hyperparameter in evaluation mode.

    Raises:
        UserError: the trainer's method has no response.
    """

    def __init__(self, trainer: Trainer, examples: int) -> None:
        method = trainer.method
        if not isinstance(method, SelfTuning):
            raise UserError(f"{type(method).__name__} has no response to hyperparameters; use SelfTuning or Δ-STN")
        self.trainer, self.space = trainer, method.space
        self.location, self.scales = method.location.detach().clone(), method.scales()
        self._center = None if method.center is None else method.center.clone()
        self.split = sampled(trainer, examples)
        self._known: dict[tuple[float, ...], float] = {}

    def _at(self, location: Tensor, examples: int) -> HyperBatch:
        return self.space.at(location, batch_size=examples, center=self._center)

    def point(self, name: str, shift: float) -> Point:
        """The point at λ + shift·σ of one hyperparameter."""
        there = self.moved({name: shift})
        return Point(shift, self.space.values(there)[name], self.loss(there))

    def moved(self, shifts: dict[str, float]) -> Tensor:
        """λ with some of the hyperparameters moved, each by a multiple of its σ."""
        there = self.location.clone()
        for name, shift in shifts.items():
            there[self.space.index(name)] += shift * self.scales[self.space.index(name)]
        return there

    def loss(self, location: Tensor) -> float:
        """The mean validation loss at a location; a location is evaluated once."""
        key = tuple(location.tolist())
        if key not in self._known:
            scores = self.trainer.evaluate(self.split, lambda examples: self._at(location, examples))
            self._known[key] = scores["loss"]
        return self._known[key]

    def slopes(self) -> dict[str, float]:
        """dF/dλ at λ of every hyperparameter: what unperturbed validation steps descend, without the entropy.

        For a text, the gradient reaches back to the beginning of each window of the evaluation, as in steps.

        Raises:
            UserError: the score ``loss`` does not depend on the hyperparameters.
        """
        location = self.location.clone().requires_grad_()
        total = torch.zeros_like(location, dtype=torch.float64)
        with torch.enable_grad(), hold_parameters(self.trainer.evaluated.parameters()):
            for scores in self.trainer.scores(self.split, lambda examples: self._at(location, examples)):
                if not scores["loss"].requires_grad:
                    raise UserError(
                        "the score `loss` has no gradient with respect to the hyperparameters: compute it from the "
                        "outputs of a network of layers that respond, without torch.no_grad or detach"
                    )
                total += torch.autograd.grad(scores["loss"], location)[0].double()
        return dict(zip(self.space.names, (total / self.split.examples).tolist(), strict=True))

    def shifts(self, name: str, span: float, points: int) -> list[float]:
        """Where to draw the curve of one hyperparameter, ascending, within ±``span`` multiples of σ; 0 is among them.

        There are ``points`` equal steps of λ, and ±2σ; for an integer, at most ``points`` of its values, each at the
        middle of those that round down to it, but the current value at λ.
        """
        one, column = self.space[name], self.space.index(name)
        if not one.integer:
            return sorted({round(float(shift), 9) for shift in (*np.linspace(-span, span, points), -BAND, 0.0, BAND)})
        location, scale = float(self.location[column]), float(self.scales[column])
        low, here, high = (int(self.space.values(self.moved({name: shift}))[name]) for shift in (-span, 0.0, span))
        if one.high is not None:
            high = min(high, math.ceil(one.high) - 1)  # float32 may round up to the bound
        numbers = np.linspace(low, high, min(points, high - low + 1)).round().astype(int).tolist()
        found = {0.0}
        for number in set(numbers) - {here}:
            least = number if one.low is None else max(number, one.low)
            most = number + 1 if one.high is None else min(number + 1, one.high)
            shift = (one.unconstrained((least + most) / 2) - location) / scale
            found.add(min(max(shift, -span), span))
        return sorted(found)

    def curve(self, name: str, span: float, points: int, slope: float) -> Curve:
        """The curve of one hyperparameter, whose ``slope`` is known."""
        found = [self.point(name, shift) for shift in self.shifts(name, span, points)]
        here, low, high = (self.point(name, shift) for shift in (0.0, -BAND, BAND))
        return Curve(name, float(self.scales[self.space.index(name)]), here, low, high, found, slope)

    def map(self, first: str, second: str, span: float, points: int) -> Map:
        """The losses over two hyperparameters, at ``points`` places of each as in their curves."""
        across, up = (self.shifts(name, span, points) for name in (first, second))
        losses = [[self.loss(self.moved({first: x, second: y})) for x in across] for y in up]
        values = [self._values(name, shifts) for name, shifts in ((first, across), (second, up))]
        return Map((first, second), (across, up), (values[0], values[1]), losses)

    def _values(self, name: str, shifts: Sequence[float]) -> list[float]:
        return [self.space.values(self.moved({name: shift}))[name] for shift in shifts]


def sampled(trainer: Trainer, examples: int) -> Split:
    """At most ``examples`` validation examples: evenly spaced ones if they are independent, else the first ones.

    For a text, they are its first words.
    """
    whole = trainer.task.data.valid
    count = whole.examples
    if examples >= count:
        return whole
    if not isinstance(trainer.task.batching, IndependentExamples):
        return Split(whole.inputs[:examples], whole.targets[:examples])
    chosen = torch.arange(examples, device=whole.targets.device) * count // examples
    return Split(*(part.index_select(0, chosen) for part in whole))


def explored(
    trainer: Trainer, *, points: int = 21, span: float = 4.0, examples: int = 5000, pairs: bool = True
) -> Exploration:
    """Evaluates the curves of all hyperparameters and, with ``pairs``, the map of the two that matter most.

    Args:
        trainer: in the state to explore; its method has a response.
        points: the number of points of a curve, at least 2; a map has half as many of each hyperparameter.
        span: how far from λ curves reach, in multiples of σ, at least 2.
        examples: the most validation examples to evaluate.

    Raises:
        UserError: the method has no response, or the score ``loss`` has no gradient.
    """
    response = Response(trainer, examples)
    slopes = response.slopes()
    curves = [response.curve(name, span, points, slopes[name]) for name in response.space.names]
    curves.sort(key=lambda curve: -curve.range)
    axes = [curve.name for curve in curves if len(curve.points) > 1]
    drawn = response.map(axes[0], axes[1], span, -(-points // 2)) if pairs and len(axes) > 1 else None
    loss = response.loss(response.location)
    return Exploration(loss, response.split.examples, trainer.task.data.valid.examples, curves, drawn)
