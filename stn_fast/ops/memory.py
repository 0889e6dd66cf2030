"""The one place where a tensor's address is taken, and what every tensor passes before that.

A kernel reads memory, and memory alone doesn't say what a tensor holds: torch may keep a sign apart (the negative bit),
have no memory at all (a ZeroTensor), or cast operands on the way (autocast). Every operation reaches its kernels
through `reads_memory`, which leaves plain numbers in plain memory, and passes `address` of them to the C++ core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def reads_memory(compute: Callable[..., Result]) -> Callable[..., Result]:
    """`compute`, of tensors on one device and other arguments, on tensors whose memory holds their numbers.

    - A tensor with the negative bit and a ZeroTensor are copied; everything else is passed as it is.
    - Autocast is off inside. Under it a product of float32 matrices is in 16 bits, and the core, which is told no more
      than an address, would read past its end. A user may have autocast on around the forward pass of an operation
      that it leaves alone, or around a backward pass alone.
    """

    @wraps(compute)
    def run(*arguments: Any, **options: Any) -> Result:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if any(map(_unread, tensors)):
            arguments = tuple(value.clone() if _unread(value) else value for value in arguments)
        device = tensors[0].device.type
        if not autocasts(device):
            return compute(*arguments, **options)
        with torch.autocast(device, enabled=False):
            return compute(*arguments, **options)

    return run


def _unread(value: Any) -> bool:
    """Whether this is a tensor whose memory doesn't hold its numbers."""
    return isinstance(value, Tensor) and (value.is_neg() or value._is_zerotensor())


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first number; 0 for None.

    Raises:
        RuntimeError: the tensor has numbers, and no memory that holds them.
    """
    if tensor is None:
        return 0
    pointer = tensor.data_ptr()
    if not pointer and tensor.numel():
        raise RuntimeError(f"a tensor {tuple(tensor.shape)} without memory reached a kernel; please report this")
    return pointer


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
