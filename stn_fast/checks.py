"""Checks of arguments: whole numbers, real numbers and bools, also NumPy's. Loads neither NumPy nor torch."""

from __future__ import annotations

import operator
import sys
from numbers import Integral, Real

INT64 = 2**63  # one more than the largest int64


def whole_number(who: str, name: str, value: object, least: int, below: int = INT64, otherwise: str = "") -> int:
    """``value`` as an int in [least, below). NumPy integers are accepted, bools and floats are not.

    ``otherwise`` is added to the message, for other values that would be right.

    Raises:
        ValueError: ``value`` is something else, or out of range.
    """
    number = value if type(value) is int else _index(value)
    if number is None or not least <= number < below:
        # A tensor or an array is shown on one line.
        shown = " ".join(repr(value).split())
        raise ValueError(
            f"{who}: {name} must be an int >= {least} and < 2**{below.bit_length() - 1}{otherwise}, got {shown}"
        )
    return number


def _index(value: object) -> int | None:
    if isinstance(value, bool) or (hasattr(value, "__array__") and not isinstance(value, Integral)):
        return None  # an array or a tensor of one number, or NumPy's bool
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def real_number(who: str, name: str, value: object) -> float:
    """``value`` as a Python int or float. NumPy numbers are accepted, bools and tensors are not.

    Raises:
        ValueError: ``value`` is something else, or not finite.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        if abs(number) <= sys.float_info.max:
            return number
    raise ValueError(f"{who}: {name} must be a finite number, got {value!r}")


def switch(who: str, name: str, value: object) -> bool:
    """``value`` as a bool. NumPy bools are accepted; text is not, because 'False' would count as true.

    Raises:
        ValueError: ``value`` is something else.
    """
    kind = type(value)
    numpys = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not numpys:
        raise ValueError(f"{who}: {name} must be True or False, got {value!r}")
    return bool(value)
