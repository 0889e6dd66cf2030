"""Parameters in the dtype of autocast, each cast once a step.

torch's autocast remembers its own casts, and offers that to nobody else. Without `casts_once`, an operation casts its
weights at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

Optional = TypeVar("Optional", Tensor, Tensor | None)


class _Copies:
    """The casts made so far, each with the parameter, which so keeps its id, and how often that had been written to."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype, bool], tuple[Tensor, int, Tensor]] = {}

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        # A copy that was made without a graph has no gradient to pass on.
        key = id(parameter), dtype, parameter.requires_grad and torch.is_grad_enabled()
        made = self._made.get(key)
        if made is None or made[1] != parameter._version:
            made = self._made[key] = parameter, parameter._version, parameter.to(dtype)
        return made[2]


_copies: ContextVar[_Copies | None] = ContextVar("stn_fast_casts", default=None)


@contextmanager
def casts_once() -> Iterator[None]:
    """Inside, each parameter is cast at the first call that needs it, and the copy serves all further calls.

    Gradients of the calls add up in the copy's dtype, as they do in torch's own autocast.
    """
    token = _copies.set(_Copies())
    try:
        yield
    finally:
        _copies.reset(token)


def cast(tensor: Optional, dtype: torch.dtype) -> Optional:
    """``tensor`` in ``dtype``; inside `casts_once` that of a parameter is made once. None is returned as it is."""
    if tensor is None or tensor.dtype == dtype:
        return tensor
    if torch.compiler.is_compiling() or not isinstance(tensor, nn.Parameter) or tensor.is_inference():
        return tensor.to(dtype)
    copies = _copies.get()
    return tensor.to(dtype) if copies is None else copies.of(tensor, dtype)
