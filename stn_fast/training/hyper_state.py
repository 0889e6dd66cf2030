"""The hyperparameters in a method's state: saved with it, and compared when it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stn_fast.described_space import differing
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.training.sharding import local


def check_made_by(state: Any, made_by: dict[str, Any]) -> None:
    """Raises ValueError if ``state`` is not a method's state, or is from another method or other optimizers."""
    if not isinstance(state, dict) or not {"made_by", "hyperparameters", "model", "optimizer"} <= state.keys():
        given = f"a dict of {', '.join(map(str, state)) or 'nothing'}" if isinstance(state, dict) else f"{state!r:.40}"
        raise ValueError(f"the state must be one that a method's state_dict() has returned, got {given}")
    for key, here in made_by.items():
        if state["made_by"][key] != here:
            there, here = (", ".join(v) if isinstance(v, list) else v for v in (state["made_by"][key], here))
            raise ValueError(f"the state was saved with the {key} {there}, but this method has {here}")


def saved_order(state: dict[str, Any], space: HyperparameterSpace) -> list[int]:
    """The position in ``state`` of each hyperparameter of ``space``.

    Raises:
        ValueError: the hyperparameters are not the same; the message names the differences.
    """
    saved = {one["name"]: one for one in state["hyperparameters"]}
    there, here = [name for name in saved if name not in space], [name for name in space.names if name not in saved]
    if there or here:
        only = [f"{', '.join(names)} only {place}" for names, place in ((there, "there"), (here, "here")) if names]
        raise ValueError(f"the state's hyperparameters are not those of this method: {'; '.join(only)}")
    if differences := differing(state["hyperparameters"], space):
        raise ValueError(f"the state's hyperparameters differ from this method's: {'; '.join(differences)}")
    return [list(saved).index(name) for name in space.names]


@torch.no_grad()
def reorder(order: Sequence[int], tensors: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Reorders the last dimension of ``tensors``, and of the optimizer states that belong to them."""
    for tensor in tensors:
        kept = [value for optimizer in optimizers for value in optimizer.state.get(tensor, {}).values()]
        for value in (tensor, *kept):
            if isinstance(value, Tensor) and value.shape[-1:] == tensor.shape[-1:]:
                own = local(value)
                own.copy_(own[..., order])


def without_description(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a model without the description of its space, which would forbid another order."""
    kept = copy.copy(state)
    for name in [name for name in state if name.endswith("tuned_hyperparameters._extra_state")]:
        del kept[name]  # type: ignore[attr-defined]
    return kept
