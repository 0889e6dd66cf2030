"""Which backend computes an operation on given tensors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from stn_fast.dispatch import Name, choose

# The kernels accumulate in float32, so float64 is left to plain torch.
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
GATED = MappingProxyType({"cpp": (torch.float32,), "triton": UP_TO_FLOAT32})
ELEMENTWISE = MappingProxyType({"cpp": UP_TO_FLOAT32, "triton": UP_TO_FLOAT32})


def serving(
    x: Tensor,
    *others: Tensor,
    takes: Mapping[str, tuple[torch.dtype, ...]] = GATED,
    without: Mapping[str, str] = MappingProxyType({}),
) -> Name:
    """The backend for tensors on the device of ``x`` and of its dtype; see `stn_fast.dispatch.choose`.

    Plain torch serves empty tensors.
    """
    if not x.numel() or not all(map(Tensor.numel, others)):
        return "reference"
    return choose(x.device, x.dtype, takes, without)
