"""What a saved state says about its hyperparameters, and how two such descriptions differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stn_fast.hyperparameters import HyperparameterSpace

# The meaning of a location, a weight and a gate depends on these; not on the scale, which is only the first σ.
COMPARED = ("low", "high", "integer", "per_example", "response", "init")


def described(space: HyperparameterSpace) -> list[dict[str, Any]]:
    """The hyperparameters of ``space`` in their order, as plain values."""
    return [{"name": one.name, **{key: getattr(one, key) for key in COMPARED}} for one in space]


def differing(saved: Sequence[Mapping[str, Any]], space: HyperparameterSpace) -> list[str]:
    """The values of hyperparameters that differ from those of the same name in ``saved``, which has all names."""
    there = {one["name"]: one for one in saved}
    return [
        f"{one['name']} {key}={there[one['name']][key]!r} there, {one[key]!r} here"
        for one in described(space)
        for key in COMPARED
        if there[one["name"]][key] != one[key] and (key != "init" or one["response"] == "shifted")
    ]
