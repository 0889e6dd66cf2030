"""Baselines of the operations: plain torch, and the bare library products as a limit.

Tests use them too, so they are written for readability and are independent of the code of stn_fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    response_weight: Tensor,
    response_bias: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    h: Tensor,
) -> Tensor:
    """y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r as two branches, every gate materialised."""
    plain = F.linear(x, weight, bias)
    response = F.linear(h, weight_gate) * F.linear(x, response_weight)
    return plain + response + F.linear(h, bias_gate) * response_bias


def gated_epilogue(
    products: Tensor,
    bias: Tensor,
    response_bias: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    h: Tensor,
) -> Tensor:
    """y from [P, Q] = x [W; R]ᵀ (B, 2·O): everything in gated_linear except its large product."""
    plain, response = products.chunk(2, dim=-1)
    return plain + bias + F.linear(h, weight_gate) * response + F.linear(h, bias_gate) * response_bias


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    response_weight: Tensor,
    response_bias: Tensor,
    weight_gate: Tensor,
    bias_gate: Tensor,
    h: Tensor,
    *,
    stride: int,
    padding: int,
) -> Tensor:
    """y = conv(x, W) + b + (h Gwᵀ) ⊙ conv(x, R) + (h Gbᵀ) ⊙ r as two branches, a gate to a channel of an example."""
    plain = F.conv2d(x, weight, bias, stride, padding)
    response = F.linear(h, weight_gate)[:, :, None, None] * F.conv2d(x, response_weight, None, stride, padding)
    return plain + response + (F.linear(h, bias_gate) * response_bias)[:, :, None, None]


def gated_channels(
    products: Tensor, bias: Tensor, response_bias: Tensor, weight_gate: Tensor, bias_gate: Tensor, h: Tensor
) -> Tensor:
    """y from [P, Q] = conv(x, [W; R]) (B, 2·O, H, W): everything in gated_conv2d except its convolution."""
    plain, response = products.chunk(2, dim=1)
    shift = bias + F.linear(h, bias_gate) * response_bias
    return plain + F.linear(h, weight_gate)[:, :, None, None] * response + shift[:, :, None, None]


class Limit(NamedTuple):
    """The bare library products of a gated linear layer, with all operands prepared beforehand.

    P = x Wᵀ, Q = x Rᵀ forward; dx = dy W + g R, dW = dyᵀ x, dR = gᵀ x backward, where g = dy ⊙ s. No bias, no
    gates, nothing elementwise. Either as products of the concatenations [W; R] and [dy, g], or two by two.
    """

    x: Tensor
    weight: Tensor
    response_weight: Tensor
    both_weights: Tensor
    dy: Tensor
    gated_dy: Tensor
    both_dy: Tensor

    @staticmethod
    def of(x: Tensor, weight: Tensor, response_weight: Tensor, dy: Tensor, gated_dy: Tensor) -> Limit:
        both_weights, both_dy = torch.cat([weight, response_weight]), torch.cat([dy, gated_dy], dim=1)
        return Limit(x, weight, response_weight, both_weights, dy, gated_dy, both_dy)

    def forward_one(self) -> tuple[Tensor, ...]:
        return (self.x @ self.both_weights.T,)

    def forward_two(self) -> tuple[Tensor, ...]:
        return self.x @ self.weight.T, self.x @ self.response_weight.T

    def backward_one(self, weights: bool) -> tuple[Tensor, ...]:
        """dx, and with ``weights`` also [dW; dR]."""
        dx = self.both_dy @ self.both_weights
        return (dx, self.both_dy.T @ self.x) if weights else (dx,)

    def backward_two(self, weights: bool) -> tuple[Tensor, ...]:
        """dx, and with ``weights`` also dW and dR."""
        dx = torch.addmm(self.dy @ self.weight, self.gated_dy, self.response_weight)
        return (dx, self.dy.T @ self.x, self.gated_dy.T @ self.x) if weights else (dx,)


class Range(NamedTuple):
    """One hyperparameter, for the eager perturbation: its bounds (None: unbounded) and whether it is floored."""

    low: float | None
    high: float | None
    integer: bool = False


def perturb(
    location: Tensor, raw_scale: Tensor, center: Tensor, ranges: Sequence[Range], batch_size: int
) -> tuple[Tensor, Tensor]:
    """(values, λ̃ − center), each (B, n): sampled and constrained op by op, with one transform per column."""
    scale = F.softplus(raw_scale.clamp(-4.0, 3.0))
    noise = torch.randn(batch_size, len(ranges), device=location.device)
    unconstrained = location + scale * noise
    values = torch.stack([constrain(unconstrained[:, k], bounds) for k, bounds in enumerate(ranges)], dim=1)
    return values, unconstrained - center


def constrain(unconstrained: Tensor, bounds: Range) -> Tensor:
    """The value of one hyperparameter (B,) within its bounds."""
    low, high, integer = bounds
    if low is not None and high is not None:
        value = low + (high - low) * torch.sigmoid(unconstrained)
    elif low is not None:
        value = low + F.softplus(unconstrained)
    elif high is not None:
        value = high - F.softplus(-unconstrained)
    else:
        value = unconstrained
    return value.floor() if integer else value


def dropout(x: Tensor, rate: Tensor, example_dim: int, shared_dims: Sequence[int]) -> Tensor:
    """x ⊙ keep / (1 − rate[b]), keep = [u ≥ rate[b]], with one mask along every shared dimension."""
    mask_shape = [1 if dim in shared_dims else size for dim, size in enumerate(x.shape)]
    rate = rate.view([-1 if dim == example_dim else 1 for dim in range(x.ndim)])
    keep = torch.rand(mask_shape, device=x.device) >= rate
    return (x * keep / (1 - rate)).to(x.dtype)
