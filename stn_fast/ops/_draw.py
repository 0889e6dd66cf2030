"""Checks that operations share which draw random numbers: where a draw lies, and one strength an example."""

import torch
from torch import Tensor


def check_coordinates(
    operation: str, device: torch.device, seed: int, step: Tensor | int, first_example: int
) -> Tensor:
    """Returns `step` as a tensor on the device; raises ValueError naming the coordinate that does not fit."""
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{operation} wants an int 0 <= seed < 2**63; got {seed!r}")
    if not isinstance(first_example, int) or first_example < 0:
        raise ValueError(f"{operation} wants an int first_example >= 0; got {first_example!r}")
    if not isinstance(step, Tensor):
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"{operation} wants an int step >= 0, or a tensor; got {step!r}")
        return torch.full((), step, dtype=torch.int64, device=device)
    if step.ndim != 0 or step.dtype != torch.int64 or step.device != device:
        raise ValueError(
            f"{operation} wants step as an int or a 0-dim int64 tensor on {device}; "
            f"got {tuple(step.shape)} {step.dtype} on {step.device}"
        )
    return step


def check_strength(operation: str, name: str, strength: Tensor, x: Tensor, batch_size: int, stream: int) -> None:
    """Raises ValueError where the strength is not one float32 number an example, or the stream is reserved."""
    if not isinstance(strength, Tensor):
        raise ValueError(
            f"{operation} wants {name} as a tensor ({batch_size},) float32, one entry an example; got {strength!r}"
        )
    if strength.shape != (batch_size,) or strength.dtype != torch.float32 or strength.device != x.device:
        raise ValueError(
            f"{operation} wants {name} ({batch_size},) float32 on {x.device}, one entry an example of x "
            f"{tuple(x.shape)}; got {tuple(strength.shape)} {strength.dtype} on {strength.device}"
        )
    check_stream(operation, stream)


def check_stream(operation: str, stream: int) -> None:
    """Raises ValueError where the stream is reserved or no 32-bit number."""
    if not 1 <= stream < 2**32:
        raise ValueError(f"{operation} wants 1 <= stream < 2**32 (0 draws the hyperparameters); got {stream}")
