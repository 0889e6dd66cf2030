"""gated_linear by the kernels of stn_fast.kernels.gated_linear."""

from __future__ import annotations

from torch import Tensor

from stn_fast.kernels import gated_linear as kernels
from stn_fast.kernels.gates import MAX_N
from stn_fast.ops.gates import GatedParameters, Gradients, Wanted


def why_not(h: Tensor) -> str | None:
    """Why kernels don't serve this response input of the right dtype; None where they do."""
    many = h.shape[-1] > MAX_N
    return f"its kernels take at most {MAX_N} hyperparameters, and h has {h.shape[-1]}" if many else None


def forward(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, x Rᵀ where it is to be saved), or of a response of low rank (y, u), u = x Bᵀ"""
    projection = parameters.response_projection
    return kernels.forward(x, *parameters[:6], h, outer, inner, save_response, projection=projection)


def backward(
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    saved: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    weight, _, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    operands = (x, weight, response_weight, response_bias, weight_gate, bias_gate, h, saved)
    return Gradients._make(kernels.backward(dy, *operands, outer, inner, wanted, projection=projection))
