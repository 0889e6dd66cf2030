"""Conversion of values from and to text: YAML 1.2, and JSON that every parser accepts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from stn_fast.extras import extra

# Patterns of complete plain scalars of YAML 1.2.
NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
MOST_DIGITS = 1000  # most digits of a whole number; Python can't print more than a few thousand


class NotYaml(ValueError):
    """Text that is not YAML: ``problem`` says why; ``line``, counted from 1, says where, if known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        self.problem, self.line = problem, line
        super().__init__(problem if line is None else f"line {line}: {problem}")


def parsed(text: str, whole: bool) -> int | float:
    """The number in a text that matches INT (``whole``) or FLOAT.

    Raises:
        ValueError: it has too many digits.
    """
    if whole:
        if len(text) > MOST_DIGITS:
            raise ValueError(f"{text[:20]}... has more than {MOST_DIGITS} digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))


def whole_number(text: str) -> int:
    """The integer that YAML 1.2 reads in ``text``.

    Raises:
        ValueError: it reads something else.
    """
    if not INT.fullmatch(text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(parsed(text, whole=True))


def number(text: str) -> float:
    """The number that YAML 1.2 reads in ``text``.

    Raises:
        ValueError: it reads something else.
    """
    if INT.fullmatch(text):
        try:
            return float(whole_number(text))
        except OverflowError:
            raise ValueError(f"{text[:20]}... is too large for a floating point number") from None
    if not FLOAT.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return parsed(text, whole=False)


def from_yaml(text: str) -> Any:
    """The value of a YAML document.

    Plain scalars follow the core schema of YAML 1.2: 1e-3 and 0o17 are numbers, 010 is ten; yes, on, 1:30 and 1_000
    are text.

    Raises:
        NotYaml: the text is not one document, or a mapping in it has a key twice.
    """
    with extra("pyyaml"):
        from stn_fast import yaml_1_2
    return yaml_1_2.load(text)


def to_yaml(value: Any) -> str:
    """``value`` as a YAML document, from which ``from_yaml`` gives an equal value."""
    with extra("pyyaml"):
        from stn_fast import yaml_1_2
    return yaml_1_2.dump(value)


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None, also in nested mappings and sequences."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON. Numbers that are not finite become null, because JSON can't represent them."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes, strict: bool = False) -> Any:
    """The value of a JSON text; unless it is ``strict``, NaN and Infinity are numbers, and a key may be there twice.

    Raises:
        ValueError: it is not JSON.
    """
    strictly: dict[str, Any] = {"parse_constant": _no_number, "object_pairs_hook": _object} if strict else {}
    try:
        return json.loads(text, **strictly)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found
