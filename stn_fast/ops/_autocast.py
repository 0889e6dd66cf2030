"""Operations on tensors as given: what a kernel is passed has the dtype that was checked, under autocast too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def as_given(compute: Callable[..., Result]) -> Callable[..., Result]:
    """`compute`, of tensors the first of which says the device, without autocast.

    Under autocast a product of float32 matrices is in 16 bits, and the core, which is told no more than its address,
    would read on behind its end. A user may have autocast on around a forward pass of an operation that it leaves
    alone, and around a backward pass alone.
    """

    @wraps(compute)
    def run(first: Tensor, *rest: object) -> Result:
        if not torch.is_autocast_enabled(first.device.type):
            return compute(first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return compute(first, *rest)

    return run
