"""The one place where a tensor's address is taken, and what every tensor passes before that.

A kernel reads memory, and memory alone doesn't say what a tensor holds: torch may keep a sign apart (the negative bit),
have no memory at all (a ZeroTensor, a gradient under vmap), or cast operands on the way (autocast). Every operation
reaches its kernels through `reads_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from stn_fast.dispatch import triton_may_serve, use_backend
from stn_fast.ops.transforms import in_function_transform, in_transform, plain

Result = TypeVar("Result")


class NoMemory(RuntimeError):
    """A tensor's memory doesn't hold its numbers."""


def reads_memory(compute: Callable[..., Result]) -> Callable[..., Result]:
    """`compute`, which takes `address` of its tensors or passes them to Triton, on tensors whose memory can be read.

    A tensor with the negative bit and a ZeroTensor are copied first. Tensors of a torch.func transform, such as a
    gradient under vmap, have no memory at all: plain torch computes them.

    Autocast is off inside. Under it a product of float32 matrices is in 16 bits, and the core, which is told no more
    than an address, would read past its end. A user may have autocast on around the forward pass of an operation that
    it leaves alone, or around a backward pass alone.
    """

    @wraps(compute)
    def run(*arguments: Any, **options: Any) -> Result:
        if _autocasts_anywhere():
            device = next(value for value in arguments if isinstance(value, Tensor)).device.type
            if autocasts(device):
                with torch.autocast(device, enabled=False):
                    return on_copies(arguments, options)
        if triton_may_serve() and any(map(_is_lazy, arguments)):  # Triton takes addresses itself
            return on_copies(arguments, options)
        try:
            return compute(*arguments, **options)
        except NoMemory:  # raised by `address`, so that the core's usual call costs nothing more
            return on_copies(arguments, options)

    def on_copies(arguments: tuple[Any, ...], options: dict[str, Any]) -> Result:
        arguments = tuple(value.clone() if _is_lazy(value) else value for value in arguments)
        if not in_function_transform() and not any(map(_is_batched, arguments)):
            return compute(*arguments, **options)
        with use_backend("reference"):
            return compute(*arguments, **options)

    return run


_autocasts_anywhere = torch._C._is_any_autocast_enabled  # one question in place of one for each device


def _is_lazy(value: Any) -> bool:
    """Whether this is a tensor whose sign torch keeps apart, or whose zeros it doesn't keep at all."""
    return isinstance(value, Tensor) and (value.is_neg() or value._is_zerotensor())


def _is_batched(value: Any) -> bool:
    """Whether this is a gradient of torch.autograd.grad(..., is_grads_batched=True)."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first number; 0 for None.

    Raises:
        NoMemory: its memory doesn't hold its numbers; `reads_memory` answers that.
    """
    if tensor is None:
        return 0
    # Asked for, not told by an address of 0: that of a slice of a ZeroTensor is another.
    if tensor.is_neg() or tensor._is_zerotensor():
        raise NoMemory(f"a tensor {tuple(tensor.shape)} without its numbers in memory reached a kernel")
    try:
        return tensor.data_ptr()
    except RuntimeError as error:
        raise NoMemory(f"{error}; stn_fast takes dense tensors: to_dense() makes one") from error


def own_address(tensor: Tensor | None) -> int:
    """`address` of a tensor that the operation has made itself, or a part of one that it has asked `address` of."""
    return 0 if tensor is None else tensor.data_ptr()


def address_to_compare(tensor: Tensor) -> int:
    """The address of a tensor's memory, only to be compared with an earlier one: no kernel reads from it."""
    return tensor.data_ptr()


def owns_storage(tensor: Tensor) -> bool:
    """Whether its storage holds nothing else, as that of a part of a larger tensor does."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def adjoin(first: Tensor, second: Tensor) -> bool:
    """Whether the second tensor is stored directly after the first, so that both are the halves of a third one."""
    if not first.layout == second.layout == torch.strided:
        return False
    if first.dtype != second.dtype or first.shape != second.shape or first.stride() != second.stride():
        return False
    if second.storage_offset() != first.storage_offset() + first.shape[0] * first.stride(0):
        return False
    # A tensor of a transform may have more dimensions than it shows, and a subclass other numbers than its memory.
    if not plain(first, second) or first.is_neg() != second.is_neg() or in_transform():
        return False
    # No address is asked for: that copies a lazily cloned tensor, and is 0 for every tensor of the meta device.
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def as_one(first: Tensor, second: Tensor) -> Tensor | None:
    """[first; second] as a view if the two `adjoin`; else None, and where autograd would miss the second one."""
    recorded = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    if recorded or not adjoin(first, second):
        return None
    return first.as_strided((2 * first.shape[0], *first.shape[1:]), first.stride())


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this device; a device that has no autocast, such as meta, never casts."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts the operands of a product with x to; None where it leaves them alone."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) and x.dtype != torch.float64 else None


def plain_strides(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor contiguous in ``layout``, with the strides that this layout prescribes for dimensions of size 1 too.

    torch accepts any stride there, and oneDNN and whoever tells layouts apart by strides reads others wrong.
    """
    _, channels, height, width = tensor.shape
    if layout == torch.channels_last:
        strides = (height * width * channels, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)
