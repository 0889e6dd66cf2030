"""The additions of one conversion: their hyperparameters in the space, and the modules that each regularises."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from stn_fast.conversion.additions import Added, Addition, Dropout, LabelSmoothing, WeightDecay
from stn_fast.conversion.rules import has_weights, is_closed
from stn_fast.conversion.selection import Named, matches
from stn_fast.hyperparameters import HyperparameterSpace


def additions_in(space: Any) -> tuple[Addition, ...] | None:
    """The additions that the argument `space` of `convert` lists; None if it is a space or None.

    Raises:
        TypeError: it is something else.
        ValueError: several are label smoothing.
    """
    if space is None or isinstance(space, HyperparameterSpace):
        return None
    if not isinstance(space, list | tuple):
        raise TypeError(f"convert: space must be a HyperparameterSpace or a list of additions, got {space!r}")
    for one in space:
        if not isinstance(one, Addition):
            raise TypeError(f"convert: a list must have additions, such as stn.WeightDecay(), got {one!r}")
    if sum(isinstance(one, LabelSmoothing) for one in space) > 1:
        raise ValueError("convert: the loss can have one label smoothing, but the list has several LabelSmoothing")
    return tuple(space)


def with_additions(suggested: HyperparameterSpace, additions: Sequence[Addition]) -> HyperparameterSpace:
    """The suggested space with the hyperparameters of the additions after its own.

    Raises:
        ValueError: two have the same name, or one that is not weight decay has its name.
    """
    replaced = any(isinstance(one, WeightDecay) for one in additions)
    space = [one for one in suggested if not (replaced and one.name == "weight_decay")]
    for addition in additions:
        name = addition.hyperparameter.name
        reserved = name == "weight_decay" and not isinstance(addition, WeightDecay)
        if reserved or any(one.name == name for one in space):
            raise ValueError(
                f"convert: {addition} would be the hyperparameter {name!r}, which is another one: give it another name"
            )
        space.append(addition.hyperparameter)
    return HyperparameterSpace(space)


def placed(model: nn.Module, chosen: Sequence[Named], additions: Sequence[Addition]) -> list[Added]:
    """The modules of each addition; a module belongs to the first of its kind that fits it.

    Raises:
        ValueError: there is none for an addition.
    """
    layers = [one.name for one in chosen if has_weights(one.module)]
    added: list[Added] = []
    for addition in additions:
        if isinstance(addition, LabelSmoothing):
            added.append(Added(addition, addition.name, ()))
            continue
        if isinstance(addition, Dropout):
            fitting, wanted = _outermost(model, chosen, addition.pattern), "a module that is called, in the model,"
        else:
            fitting = [name for name in layers if matches(name, [addition.pattern])]
            wanted = "a converted layer that is not a norm,"
        taken = {name for one in added if type(one.addition) is type(addition) for name in one.modules}
        modules = tuple(name for name in fitting if name not in taken)
        if not modules:
            raise ValueError(
                f"convert: there is no module for {addition}: its pattern must fit {wanted} and that no "
                f"{type(addition).__name__} before it fits"
            )
        added.append(Added(addition, addition.hyperparameter.name, modules))
    return added


def _outermost(model: nn.Module, chosen: Sequence[Named], pattern: str) -> list[str]:
    """The modules that the pattern fits and that are called, except the model and those within others that it fits.

    Without a forward function, or in a plain module that reads their parameters instead, they are not called.
    """
    found: list[str] = []
    converted = {one.name for one in chosen}
    closed = [name for name, module in model.named_modules() if is_closed(module) and name not in converted]
    for name, module in model.named_modules():  # a module comes before those in it
        is_called = type(module).forward is not nn.Module.forward
        within = any(name.startswith(f"{other}.") for other in (*found, *closed))
        if name and fnmatchcase(name, pattern) and is_called and not within:
            found.append(name)
    return found


def decay_names(added: Sequence[Added]) -> dict[str, str]:
    """{dotted name of a layer: the hyperparameter that decays its weights}"""
    return {name: one.hyperparameter for one in added if isinstance(one.addition, WeightDecay) for name in one.modules}
