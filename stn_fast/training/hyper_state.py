"""Hyperparameters as a part of a method's state: written down with it, and compared when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from stn_fast.hyperparameters import HyperparameterSpace

# What a location, a weight and a gate mean depends on. The scale doesn't count: it is only where σ starts.
COMPARED = ("low", "high", "integer", "per_example", "response", "init")


def described(space: HyperparameterSpace) -> list[dict[str, Any]]:
    """The hyperparameters of ``space`` in their order, as plain values."""
    return [{"name": one.name, **{key: getattr(one, key) for key in COMPARED}} for one in space]


def check_made_by(state: Any, made_by: dict[str, Any]) -> None:
    """Raises ValueError where ``state`` is not that of a method, or one of another method or other optimizers."""
    if not isinstance(state, dict) or not {"made_by", "hyperparameters", "model", "optimizer"} <= state.keys():
        given = f"a dict of {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, dict) else f"{state!r:.40}"
        raise ValueError(f"the state must be one that a method's state_dict() has returned, got {given}")
    for key, here in made_by.items():
        if state["made_by"][key] != here:
            there, here = (", ".join(v) if isinstance(v, list) else v for v in (state["made_by"][key], here))
            raise ValueError(f"the state was saved with the {key} {there}, and this method has {here}")


def saved_order(state: dict[str, Any], space: HyperparameterSpace) -> list[int]:
    """Where each hyperparameter of ``space`` stands in ``state``.

    Raises:
        ValueError: the state has others, or they differ; the message says what is where.
    """
    saved = {one["name"]: one for one in state["hyperparameters"]}
    there, here = [name for name in saved if name not in space], [name for name in space.names if name not in saved]
    if there or here:
        only = [f"{', '.join(names)} only {place}" for names, place in ((there, "there"), (here, "here")) if names]
        raise ValueError(f"the state has other hyperparameters than this method: {'; '.join(only)}")
    differences = [
        f"{one['name']} {key}={saved[one['name']][key]!r} there, {one[key]!r} here"
        for one in described(space)
        for key in COMPARED
        if saved[one["name"]][key] != one[key] and (key != "init" or one["response"] == "shifted")
    ]
    if differences:
        raise ValueError(f"the state's hyperparameters differ from this method's: {'; '.join(differences)}")
    return [list(saved).index(name) for name in space.names]


@torch.no_grad()
def reorder(order: Sequence[int], tensors: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Puts the last dimension of ``tensors``, and of what ``optimizers`` keep of them, into another order."""
    for tensor in tensors:
        kept = [value for optimizer in optimizers for value in optimizer.state.get(tensor, {}).values()]
        for value in (tensor, *kept):
            if isinstance(value, Tensor) and value.shape[-1:] == tensor.shape[-1:]:
                value.copy_(value[..., order])
