"""torch.nn.functional.linear by the library that `products` chooses, for decoders and folded gated layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.dispatch import choose
from stn_fast.ops import products
from stn_fast.ops.tangents import dual, paused, split
from stn_fast.ops.transforms import in_forward_mode, in_function_transform, in_transform, traced

SMALL = 20_000_000  # multiply-adds below which the overhead exceeds the time saved by the faster product


class _Linear(torch.autograd.Function):
    """The backward pass consists of differentiable operations; only the tensors that they read are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return products.times_transpose(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight) = gradients, ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            linear(dy, weight.T) if wants_x else None,
            _weight_gradient(dy, x) if wants_weight else None,
            dy.sum(0) if wants_bias else None,
        )


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ x; by the faster library where no second derivative may be asked for."""
    if torch.is_grad_enabled():
        return dy.T @ x
    sums = products.SumOverRows()
    sums.add(dy.contiguous(), x)
    total = sums.total()
    assert total is not None
    return total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., I), W (O, I) and b (O,); accepts and raises the same as torch.nn.functional.linear."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if in_forward_mode() and not in_function_transform() and all(split(t)[1] is None for t in tensors[1:]):
        primal, tangent = split(x)
        with paused():
            y, dy = linear(primal, weight, bias), None if tangent is None else linear(tangent, weight)
        return dual(y, dy)
    if torch.jit.is_tracing() or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    if in_transform() or traced(*tensors) or not all(map(_suits, tensors)) or choose(x.device) != "cpp":
        return F.linear(x, weight, bias)
    fits = weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or x.numel() * len(weight) < SMALL or products.library() != "oneDNN":
        return F.linear(x, weight, bias)
    # The library reads a bias, and an x expanded from one number, as if they were contiguous.
    operands = x.reshape(-1, x.shape[-1]).contiguous(), weight, None if bias is None else bias.contiguous()
    y = _Linear.apply(*operands) if torch.is_grad_enabled() else products.times_transpose(*operands)
    return y.view(*x.shape[:-1], len(weight))


def _suits(tensor: Tensor) -> bool:
    """Whether oneDNN's product accepts it: float32 on the CPU, not empty, and without autocast."""
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return tensor.layout == torch.strided and tensor.numel() > 0
