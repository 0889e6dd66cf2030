"""One hyperparameter: its range, first guess and perturbation, and checks that float32 can represent them.

Loads neither NumPy nor torch, because configurations are checked with it.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from stn_fast.checks import real_number, switch

RAW_SCALE_BOUNDS = (-4.0, 3.0)
"""Raw scales are clamped into this interval, so that sigma = softplus(raw_scale) stays in [0.0181, 3.0486]."""

NO_BOUND, LOWER_BOUND, UPPER_BOUND, BOTH_BOUNDS = range(4)

Response = Literal["shifted", "raw", "value"]
ResponseRank = int | Literal["auto"] | None


def inverse_softplus(y: float) -> float:
    """The x with log(1 + eˣ) = y > 0; accurate for tiny and for large y."""
    return y + math.log(-math.expm1(-y))


SCALE_BOUNDS = tuple(math.log1p(math.exp(bound)) for bound in RAW_SCALE_BOUNDS)


FUNCTION_ERROR = 2.0**-22  # largest relative difference between float32 implementations of exp and log: four roundings


class WrongHyperparameter(ValueError):
    """An invalid argument of a `Hyperparameter`: its name, its value, and the problem."""

    def __init__(self, name: str, argument: str, value: object, problem: str):
        self.argument, self.value, self.problem = argument, value, problem
        super().__init__(f"hyperparameter {name!r}: {argument}={value!r} {problem}")


@dataclass(frozen=True)
class Hyperparameter:
    """One tuned hyperparameter: its range, first guess and perturbation.

    The unconstrained location λ maps to the value: low + (high − low)·sigmoid(λ) with both bounds,
    low + softplus(λ) with only a lower bound, high − softplus(−λ) with only an upper bound, λ itself without bounds.

    Args:
        name: the name to look it up by, `hyper["name"]`.
        init: constrained value to start from, strictly inside (low, high), also in float32. For an integer, a half such
            as 1.5 starts in the middle between two steps of the floor.
        low, high: bounds, None for no bound. The upper bound of a dropout rate must be below 1. Values are float32, so
            a bound just inside a whole number, such as 0.99999999, is an error if float32 rounds it to that number.
        scale: initial standard deviation σ of the perturbation of λ, within [0.0181, 3.0486].
        integer: whether the value is rounded down. The floor passes no gradient, so an integer is tuned only through
            the response of the weights.
        per_example: True draws a perturbation for each example, False one for the whole batch.
        response: what the gates of the layers see: "shifted" λ̃ − λ₀ (default, well conditioned), "raw" λ̃, or
            "value" the constrained value (the last two as published; prone to diverge). "value" is not allowed for
            integers, as their value has no gradient.

    NumPy numbers are accepted, and stored as Python numbers.

    Attributes:
        reach: the lowest and highest value that float32 can reach; infinite without a bound.

    Raises:
        ValueError: an argument is out of range; the message names the hyperparameter and the argument.
    """

    name: str
    _: KW_ONLY
    init: float
    low: float | None = None
    high: float | None = None
    scale: float = 0.5
    integer: bool = False
    per_example: bool = True
    response: Response = "shifted"
    reach: tuple[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Hyperparameter: name must be a non-empty string, got {self.name!r}")
        who = f"hyperparameter {self.name!r}"
        for argument in ("low", "high", "init", "scale"):
            value = getattr(self, argument)
            if value is not None or argument in ("init", "scale"):
                try:
                    object.__setattr__(self, argument, real_number(who, argument, value))
                except ValueError:
                    raise self._wrong(argument, "must be a finite number") from None
        for argument in ("integer", "per_example"):
            object.__setattr__(self, argument, switch(who, argument, getattr(self, argument)))
        if self.response not in ("shifted", "raw", "value"):
            raise self._wrong("response", "must be 'shifted', 'raw' or 'value'")
        if self.integer and self.response == "value":
            raise self._wrong(
                "response",
                "cannot tune an integer, because no gradient passes through the floor: use 'shifted', which is λ̃ − λ₀",
            )
        self._check_range()
        object.__setattr__(self, "reach", self._reach())
        self._check_float32()

    def _wrong(self, argument: str, problem: str) -> WrongHyperparameter:
        return WrongHyperparameter(self.name, argument, getattr(self, argument), problem)

    def _check_range(self) -> None:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if low >= high:
            raise self._wrong("high", f"must be above low={self.low}")
        if not low < self.init < high:
            raise self._wrong("init", f"must be strictly inside ({low}, {high})")
        if not SCALE_BOUNDS[0] <= self.scale <= SCALE_BOUNDS[1]:
            bounds = f"[{SCALE_BOUNDS[0]:.4f}, {SCALE_BOUNDS[1]:.4f}]"
            raise self._wrong("scale", f"must be in {bounds}, in units of the unconstrained λ")

    def _check_float32(self) -> None:
        """Raises if float32, in which the values are computed, cannot represent the range or the first guess."""
        for argument in ("low", "high", "init"):
            value = getattr(self, argument)
            if value is not None and math.isinf(as_float32(value)):
                raise self._wrong(argument, "is too large for float32, whose largest value is 3.4e38")
        low, high = self.reach
        if not low < high:
            raise self._wrong("high", f"is the same number in float32 as low={self.low}")
        if self.low is not None and self.high is not None and math.isinf(high):
            raise self._wrong("high", f"minus low={self.low} is too large for float32, whose largest value is 3.4e38")
        for argument, bound, reached, outside in (
            ("low", self.low, low, low < (self.low or 0)),
            ("high", self.high, high, high > (self.high or 0)),
        ):
            # Every bound may be rounded a little; only whole numbers, such as a rate of 1, must not be reached.
            if bound is not None and outside and reached == round(reached) and abs(reached) < 2**23:
                raise self._wrong(argument, f"excludes {reached:g}, but float32 values reach it: move it away")
        least, most = self._in_float32(self.start)
        if not low < least <= most < high or not low < as_float32(self.init) < high:
            raise self._wrong("init", f"is too close to a bound of ({low:g}, {high:g}) for float32")
        if self.integer and not math.floor(least) == math.floor(most) == math.floor(self.init):
            raise self._wrong("init", f"is {least:g} in float32, which changes its floor")

    @property
    def kind(self) -> int:
        return {
            (False, False): NO_BOUND,
            (True, False): LOWER_BOUND,
            (False, True): UPPER_BOUND,
            (True, True): BOTH_BOUNDS,
        }[self.low is not None, self.high is not None]

    @property
    def row(self) -> tuple[float, ...]:
        """The hyperparameter's row in the table that kernels read, `stn_fast.ops.perturb.Table`."""
        return self.kind, self.low or 0.0, self.high or 0.0, self.integer, self.per_example, self.response == "value"

    def _reach(self) -> tuple[float, float]:
        low = -math.inf if self.low is None else as_float32(self.low)
        high = math.inf if self.high is None else as_float32(self.high)
        return low, as_float32(low + as_float32(high - low)) if self.kind == BOTH_BOUNDS else high

    @property
    def start(self) -> float:
        """λ₀. For an integer, raised by a few float32 roundings if these could lower the floor of `init`."""
        location = self.unconstrained(self.init)
        if not self.integer:
            return location
        above = location + 4e-6 * max(1.0, abs(location))
        return above if math.floor(self._in_float32(above)[0]) == math.floor(self.init) else location

    def _in_float32(self, location: float) -> tuple[float, float]:
        """The lowest and highest value that float32 arithmetic may give for λ = `location`, before any floor."""
        location = as_float32(location)
        if self.kind == NO_BOUND:
            return location, location
        if self.kind == BOTH_BOUNDS:
            curve, base = 1 / (1 + math.exp(-location)) if location > -700 else 0.0, self.low or 0.0
            scale = as_float32(as_float32(self.high or 0.0) - as_float32(base))
        elif self.kind == LOWER_BOUND:
            curve, base, scale = _softplus(location), self.low or 0.0, 1.0
        else:
            curve, base, scale = _softplus(-location), self.high or 0.0, -1.0
        ends = [
            as_float32(as_float32(base) + as_float32(scale * as_float32(curve * (1 + sign * FUNCTION_ERROR))))
            for sign in (-1, 1)
        ]
        if min(curve, abs(scale) * curve) < LEAST_NORMAL:  # vectorised code and GPUs may flush it to 0
            ends.append(as_float32(base))
        return min(ends), max(ends)

    def unconstrained(self, value: float) -> float:
        """The λ of a constrained value strictly inside the range: the inverse of the map above, in float64."""
        if self.low is not None and self.high is not None:
            return math.log(value - self.low) - math.log(self.high - value)
        if self.low is not None:
            return inverse_softplus(value - self.low)
        if self.high is not None:
            return -inverse_softplus(self.high - value)
        return value


LEAST_NORMAL = 2.0**-126  # of float32; smaller numbers have fewer digits


def as_float32(value: float) -> float:
    """`value` rounded to float32; infinite if it is too large."""
    return ctypes.c_float(value).value


def _softplus(x: float) -> float:
    """log(1 + eˣ), accurate for tiny results too."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
