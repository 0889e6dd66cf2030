"""Checks that dropout and noise share: one strength an example, and the coordinates of a random draw."""

import torch
from torch import Tensor


def check_draw(
    operation: str,
    name: str,
    strength: Tensor,
    x: Tensor,
    batch_size: int,
    seed: int,
    step: Tensor | int,
    stream: int,
) -> Tensor:
    """Returns `step` as a tensor; raises ValueError naming the argument that does not fit."""
    if strength.shape != (batch_size,) or strength.dtype != torch.float32 or strength.device != x.device:
        raise ValueError(
            f"{operation} wants {name} ({batch_size},) float32 on {x.device}, one entry an example of x "
            f"{tuple(x.shape)}; got {tuple(strength.shape)} {strength.dtype} on {strength.device}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{operation} wants 0 <= seed < 2**63; got {seed}")
    if not 1 <= stream < 2**32:
        raise ValueError(f"{operation} wants 1 <= stream < 2**32 (0 draws the hyperparameters); got {stream}")
    if not isinstance(step, Tensor):
        return torch.full((), step, dtype=torch.int64, device=x.device)
    if step.ndim != 0 or step.dtype != torch.int64 or step.device != x.device:
        raise ValueError(
            f"{operation} wants step as an int or a 0-dim int64 tensor on {x.device}; "
            f"got {tuple(step.shape)} {step.dtype} on {step.device}"
        )
    return step
