"""Two tensors stored as the halves of a third one.

An operation on [W; R] then needs no copy of W and R.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stn_fast.ops.memory import adjoin, as_one
from stn_fast.ops.transforms import traced

Pair: TypeAlias = tuple[Tensor, Tensor]


def are_halves(first: nn.Parameter | None, second: nn.Parameter | None) -> bool:
    """Whether both are parameters, and stored as the halves of one tensor."""
    return first is not None and second is not None and adjoin(first, second)


def make_halves(first: nn.Parameter | None, second: nn.Parameter | None) -> None:
    """Moves two parameters into the halves of a new tensor, unless they already are halves, or don't match.

    Parameters in shared or pinned memory are not moved.
    """
    if type(first) is not nn.Parameter or type(second) is not nn.Parameter or adjoin(first, second):
        return
    alike = (first.dtype, first.device, first.shape) == (second.dtype, second.device, second.shape)
    if not alike or not first.layout == second.layout == torch.strided:
        return
    if not any((half.is_shared() and not half.is_cuda) or half.is_pinned() for half in (first, second)):
        first.data, second.data = torch.cat([first.data, second.data]).chunk(2)


def convert(first: Tensor, second: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Pair:
    """Both in the given dtype and memory format, contiguous or channels_last.

    Halves of one tensor are converted in one pass to halves of one tensor, and so are their gradients.
    """
    if all(tensor.dtype == dtype and tensor.is_contiguous(memory_format=layout) for tensor in (first, second)):
        return first, second
    both_recorded = torch.is_grad_enabled() and first.requires_grad and second.requires_grad
    together = both_recorded and not traced(first, second) and adjoin(first, second)
    halves: Pair = (_Converted.apply if together else _convert)(first, second, dtype, layout)
    return halves


class _Converted(torch.autograd.Function):
    """Conversion of halves of one tensor; the gradients get the dtype and memory format of the originals."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Pair:
        ctx.set_materialize_grads(False)
        ctx.before = first.dtype, torch.contiguous_format if first.is_contiguous() else torch.channels_last
        return _convert(first, second, dtype, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *_convert(*gradients, *ctx.before), None, None


def _convert(first: Any, second: Any, dtype: torch.dtype, layout: torch.memory_format) -> Any:
    # A trace would always read the second half from the memory after the first one.
    apart = first is None or second is None or traced(first, second)
    if not apart and (both := as_one(first, second)) is not None:
        return _convert_one(both, dtype, layout).chunk(2)
    return tuple(None if half is None else _convert_one(half, dtype, layout) for half in (first, second))


def _convert_one(tensor: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    # At most one copy. `to` recognises layouts by strides, and may take a transposed tensor for a contiguous one.
    return tensor.to(dtype, memory_format=layout).contiguous(memory_format=layout)
