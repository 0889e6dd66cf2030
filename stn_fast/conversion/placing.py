"""The additions of one conversion: their hyperparameters in the space, and the modules that each regularises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stn_fast.conversion.additions import Added, Addition, WeightDecay
from stn_fast.conversion.rules import has_weights
from stn_fast.conversion.selection import Named, matches
from stn_fast.hyperparameters import HyperparameterSpace


def additions_in(space: Any) -> tuple[Addition, ...] | None:
    """The additions that the argument `space` of `convert` lists; None if it is a space or None.

    Raises:
        TypeError: it is something else.
    """
    if space is None or isinstance(space, HyperparameterSpace):
        return None
    if not isinstance(space, list | tuple):
        raise TypeError(f"convert: space must be a HyperparameterSpace or a list of additions, got {space!r}")
    for one in space:
        if not isinstance(one, Addition):
            raise TypeError(f"convert: a list must have additions, such as stn.WeightDecay(), got {one!r}")
    return tuple(space)


def with_additions(suggested: HyperparameterSpace, additions: Sequence[Addition]) -> HyperparameterSpace:
    """The suggested space with the hyperparameters of the additions after its own.

    Raises:
        ValueError: two have the same name.
    """
    replaced = any(isinstance(one, WeightDecay) for one in additions)
    space = [one for one in suggested if not (replaced and one.name == "weight_decay")]
    for addition in additions:
        name = addition.hyperparameter.name
        if any(one.name == name for one in space):
            raise ValueError(f"convert: {addition} is called {name!r}, as another hyperparameter is: give it a name")
        space.append(addition.hyperparameter)
    return HyperparameterSpace(space)


def placed(chosen: Sequence[Named], additions: Sequence[Addition]) -> list[Added]:
    """The modules of each addition; a module belongs to the first of its kind that fits it.

    Raises:
        ValueError: there is none for an addition.
    """
    layers = [one.name for one in chosen if has_weights(one.module)]
    added = []
    for addition in additions:
        modules = tuple(name for name in layers if matches(name, [addition.pattern]))
        layers = [name for name in layers if name not in modules]
        if not modules:
            raise ValueError(
                f"convert: there is no module for {addition}: its pattern must fit a converted layer that is not a "
                "norm, and that no WeightDecay before it fits"
            )
        added.append(Added(addition, addition.hyperparameter.name, modules))
    return added


def decay_names(added: Sequence[Added]) -> dict[str, str]:
    """{dotted name of a layer: the hyperparameter that decays its weights}"""
    return {name: one.hyperparameter for one in added if isinstance(one.addition, WeightDecay) for name in one.modules}
