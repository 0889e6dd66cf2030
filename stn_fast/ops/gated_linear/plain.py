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
    """(y, x Rᵀ), or of a response of low rank (y, u), u = x Bᵀ."""
    weight, bias, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    u = x if projection is None else x @ projection.T
    q = u @ response_weight.T
    y = F.linear(x, weight, bias) + rows_of(h @ weight_gate.T, outer, inner) * q
    if response_bias is not None and bias_gate is not None:
        y = y + rows_of((h @ bias_gate.T) * response_bias, outer, inner)
    return y, q if projection is None else u


@any_team
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
    """The formulas, and of them only what is wanted; `saved` is what forward returned beside y."""
    weight, response_weight, projection = parameters.weight, parameters.response_weight, parameters.response_projection
    dx = dy @ weight if wanted.x else None
    d_response_weight = d_projection = None
    if wanted.x or wanted.response_weight or wanted.response_projection:
        g = dy * rows_of(h @ parameters.weight_gate.T, outer, inner)
        if wanted.response_weight:
            d_response_weight = g.T @ (x if projection is None else saved)
        if projection is None:
            dx = dx + g @ response_weight if dx is not None else None
        elif wanted.x or wanted.response_projection:
            du = g @ response_weight
            dx = dx + du @ projection if dx is not None else None
            d_projection = du.T @ x if wanted.response_projection else None
    exact = dy.to(wide(dy.dtype))
    d_scale = d_shift = None
    if wanted.scale:
        q = saved if projection is None else saved @ response_weight.T
        d_scale = sum_of_rows(exact * q, outer, len(h), inner)
    if wanted.shift and parameters.response_bias is not None:
        d_shift = sum_of_rows(exact, outer, len(h), inner)
    of_gates = gate_gradients(d_scale, d_shift, parameters, h, wanted)
    return gradients(
        of_gates,
        x=dx,
        weight=dy.T @ x if wanted.weight else None,
        response_weight=d_response_weight,
        response_projection=d_projection,
    )
