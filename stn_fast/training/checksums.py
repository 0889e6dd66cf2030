"""Checksums of tensors, by which processes find out that they hold the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 18  # numbers, so that 64-bit copies of a large tensor are never all there
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def bits(tensor: Tensor) -> Tensor:
    """The bit pattern of each number as an int64, in one dimension."""
    flat = _flat(tensor)
    return flat.view(_INTEGERS[flat.element_size()]).to(torch.int64)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Σ_k (2k + 1)·bits_k modulo 2⁶⁴, an int64 scalar: a change of one number always changes it."""
    flat = _flat(tensor)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    odd = torch.arange(1, 2 * min(_AT_ONCE, flat.numel()) + 1, 2, dtype=torch.int64, device=tensor.device)
    for first in range(0, flat.numel(), _AT_ONCE):
        found = bits(flat[first : first + _AT_ONCE])
        total += (found * odd[: len(found)]).sum() + 2 * first * found.sum()
    return total


def _flat(tensor: Tensor) -> Tensor:
    """Its real numbers, in one dimension."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().contiguous().flatten()
