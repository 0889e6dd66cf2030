"""Parameters in the dtype of autocast, each cast once per step.

torch's autocast caches its own casts, but operations outside of torch can't use this cache. Without `casts_once`, an
operation casts its weights at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stn_fast.ops.halves import Pair, convert

Optional = TypeVar("Optional", Tensor, Tensor | None)


class _Copies:
    """The casts made so far, each with its parameters (so that their ids are not reused) and their versions."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[tuple[Tensor, ...], list[int], tuple[Tensor, ...]]] = {}

    def of(
        self, parameters: tuple[Tensor, ...], make: Callable[..., tuple[Tensor, ...]], *how: Any
    ) -> tuple[Tensor, ...]:
        """The cached result of `make(*parameters, *how)`."""
        # A copy made without a graph can't pass on gradients.
        with_graph = [parameter.requires_grad and torch.is_grad_enabled() for parameter in parameters]
        key = (*map(id, parameters), *with_graph, *how)
        versions = [parameter._version for parameter in parameters]
        made = self._made.get(key)
        if made is None or made[1] != versions:
            made = self._made[key] = parameters, versions, make(*parameters, *how)
        return made[2]


_copies: ContextVar[_Copies | None] = ContextVar("stn_fast_casts", default=None)


@contextmanager
def casts_once() -> Iterator[None]:
    """Inside, each parameter is cast at the first call that needs it, and later calls reuse the copy.

    Gradients of the calls are accumulated in the dtype of the copy, as in torch's own autocast.
    """
    token = _copies.set(_Copies())
    try:
        yield
    finally:
        _copies.reset(token)


def cast(tensor: Optional, dtype: torch.dtype) -> Optional:
    """``tensor`` in ``dtype``; inside `casts_once`, a parameter is cast only once. None is returned unchanged."""
    if tensor is None or tensor.dtype == dtype:
        return tensor
    copies = _copies_of(tensor)
    return tensor.to(dtype) if copies is None else copies.of((tensor,), _cast, dtype)[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    return (tensor.to(dtype),)


def cast_pair(first: Tensor, second: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Pair:
    """Both in ``dtype`` and ``layout`` by `convert`; inside `casts_once`, two parameters are converted only once."""
    copies = _copies_of(first, second)
    if copies is None or first.dtype == second.dtype == dtype:
        return convert(first, second, dtype, layout)
    one, other = copies.of((first, second), convert, dtype, layout)
    return one, other


def _copies_of(*tensors: Tensor) -> _Copies | None:
    """The cache inside `casts_once`; None outside of it, and for tensors that are not parameters."""
    if torch.compiler.is_compiling():
        return None
    kept = all(isinstance(tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors)
    return _copies.get() if kept else None
