"""Checks of arguments: whole numbers, real numbers and switches, NumPy's included, and tensors."""

from __future__ import annotations

import operator
import sys
from numbers import Integral, Real

import numpy as np
from torch import Tensor

INT64 = 2**63  # one more than the largest int64


def whole_number(who: str, name: str, value: object, least: int, below: int = INT64, otherwise: str = "") -> int:
    """``value`` as an int in [least, below); NumPy's integers are taken, bools and floats are not.

    ``otherwise`` adds to the message what else would be right.

    Raises:
        ValueError: it is something else, or out of range.
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
    if isinstance(value, bool | Tensor | np.ndarray):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def real_number(who: str, name: str, value: object) -> float:
    """``value`` as a Python number, an int where it is one; NumPy's numbers are taken, bools and tensors are not.

    Raises:
        ValueError: it is something else, or not finite.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, Integral) else float(value)
        if abs(number) <= sys.float_info.max:
            return number
    raise ValueError(f"{who}: {name} must be a finite number, got {value!r}")


def switch(who: str, name: str, value: object) -> bool:
    """``value`` as a bool; NumPy's is taken. Text is not: 'False' would count as true.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{who}: {name} must be True or False, got {value!r}")
    return bool(value)


def tensor(who: str, name: str, value: object) -> None:
    """Raises TypeError where ``value`` is not a tensor."""
    if not isinstance(value, Tensor):
        hint = f"; torch.from_numpy({name}) makes one of it" if isinstance(value, np.ndarray) else ""
        kind = type(value)
        given = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{who}: {name} must be a torch.Tensor, got {given}{hint}")
