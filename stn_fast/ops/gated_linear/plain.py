"""gated_linear in plain torch, forward and backward, for what no kernel computes: any dtype, device and size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, Gradients, Wanted, gate_gradients, gradients, rows_of, sum_of_rows, wide
from stn_fast.ops.openmp import any_team


@any_team
def forward(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> tuple[Tensor, Tensor]:
    """(y, x Rᵀ)"""
    weight, bias, response_weight, response_bias, weight_gate, bias_gate = parameters
    q = x @ response_weight.T
    y = F.linear(x, weight, bias) + rows_of(h @ weight_gate.T, outer, inner) * q
    if response_bias is not None and bias_gate is not None:
        y = y + rows_of((h @ bias_gate.T) * response_bias, outer, inner)
    return y, q


@any_team
def backward(
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    q: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    """The formulas, and of them only what is wanted."""
    weight, _, response_weight, response_bias, weight_gate, _ = parameters
    dx = d_response_weight = None
    if wanted.x or wanted.response_weight:
        g = dy * rows_of(h @ weight_gate.T, outer, inner)
        dx = dy @ weight + g @ response_weight if wanted.x else None
        d_response_weight = g.T @ x if wanted.response_weight else None
    exact = dy.to(wide(dy.dtype))
    d_scale = sum_of_rows(exact * q, outer, len(h), inner) if wanted.scale else None
    d_shift = sum_of_rows(exact, outer, len(h), inner) if wanted.shift and response_bias is not None else None
    of_gates = gate_gradients(d_scale, d_shift, parameters, h, wanted)
    return gradients(
        of_gates,
        x=dx,
        weight=dy.T @ x if wanted.weight else None,
        response_weight=d_response_weight,
    )
