"""The only place that takes the address of a tensor, and the guards before that.

A kernel reads memory, which may not hold a tensor's numbers: torch may store the sign separately (the negative bit),
allocate no memory at all (a ZeroTensor, a gradient under vmap), or cast operands (autocast). Every operation calls its
kernels through `reads_memory`.
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
    """Decorates `compute`, which calls `address` or passes tensors to Triton, so that it only gets readable tensors.

    A tensor with the negative bit and a ZeroTensor are copied first. Tensors of a torch.func transform, such as a
    gradient under vmap, have no memory at all: for these, plain torch is used.

    Autocast is off inside. With it, a product of float32 matrices would have 16 bits, and the core, which only gets an
    address, would read past its end. Autocast may be on around the forward pass of an operation that it doesn't cast,
    or only around a backward pass.
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
        except NoMemory:  # raised by `address`, so that the usual case has no extra cost
            return on_copies(arguments, options)

    def on_copies(arguments: tuple[Any, ...], options: dict[str, Any]) -> Result:
        arguments = tuple(value.clone() if _is_lazy(value) else value for value in arguments)
        if not in_function_transform() and not any(map(_is_batched, arguments)):
            return compute(*arguments, **options)
        with use_backend("reference"):
            return compute(*arguments, **options)

    return run


_autocasts_anywhere = torch._C._is_any_autocast_enabled  # a single check for all devices


def _is_lazy(value: Any) -> bool:
    """Whether this is a tensor with the negative bit, or a ZeroTensor."""
    return isinstance(value, Tensor) and (value.is_neg() or value._is_zerotensor())


def _is_batched(value: Any) -> bool:
    """Whether this is a gradient of torch.autograd.grad(..., is_grads_batched=True)."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first number; 0 for None.

    Raises:
        NoMemory: its memory doesn't hold its numbers; `reads_memory` handles this.
    """
    if tensor is None:
        return 0
    # An address of 0 is not sufficient as a test: a slice of a ZeroTensor may have another one.
    if tensor.is_neg() or tensor._is_zerotensor():
        raise NoMemory(f"a tensor {tuple(tensor.shape)} without its numbers in memory reached a kernel")
    try:
        return tensor.data_ptr()
    except RuntimeError as error:
        raise NoMemory(f"{error}; stn_fast needs dense tensors: use to_dense()") from error


def own_address(tensor: Tensor | None) -> int:
    """Address of a tensor that the operation itself has created, or of a part of one that `address` has checked."""
    return 0 if tensor is None else tensor.data_ptr()


def address_to_compare(tensor: Tensor) -> int:
    """The address of a tensor's memory, only to be compared with an earlier one: no kernel reads from it."""
    return tensor.data_ptr()


def owns_storage(tensor: Tensor) -> bool:
    """Whether its storage holds only this tensor, which is not part of a larger one."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def adjoin(first: Tensor, second: Tensor) -> bool:
    """Whether the second tensor is stored directly after the first, so that both are the halves of a third one."""
    if not first.layout == second.layout == torch.strided:
        return False
    if first.dtype != second.dtype or first.shape != second.shape or first.stride() != second.stride():
        return False
    if second.storage_offset() != first.storage_offset() + first.shape[0] * first.stride(0):
        return False
    # A tensor of a transform may have hidden dimensions, and the memory of a subclass may not hold its numbers.
    if not plain(first, second) or first.is_neg() != second.is_neg() or in_transform():
        return False
    # Addresses are not compared: reading one copies a lazily cloned tensor, and it is 0 on the meta device.
    return first.untyped_storage()._cdata == second.untyped_storage()._cdata


def as_one(first: Tensor, second: Tensor) -> Tensor | None:
    """[first; second] as a view; None if the two don't `adjoin`, or if autograd would miss the second one."""
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
    """The dtype to which autocast casts the operands of a product with x; None if it doesn't cast them."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) and x.dtype != torch.float64 else None


def plain_strides(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor contiguous in ``layout``, with the exact strides of this layout also for dimensions of size 1.

    torch accepts any stride there, but oneDNN and other code that recognises layouts by their strides may not.
    """
    _, channels, height, width = tensor.shape
    if layout == torch.channels_last:
        strides = (height * width * channels, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)
