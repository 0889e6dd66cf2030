"""Gated linear layers of more hyperparameters than a kernel holds in registers: gates are tables, made by the library.

With s = h Gwᵀ and c = (h Gbᵀ) ⊙ r + b, (B, O) each: y = x Wᵀ + s ⊙ (x Rᵀ) + c, every example's row at its positions.
Everything is a library product or an element-wise operation of torch, and sums over positions are in float32. Slower
than the kernels by a few passes over (M, O); right for any number of hyperparameters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """(y, q) with q = x Rᵀ, as `gated_linear.forward` defines them."""
    y, q = torch.mm(x, weight.T), torch.mm(x, response_weight.T)
    positions = (outer, h.shape[0], inner, weight.shape[0])
    table = torch.mm(h, weight_gate.T)[:, None]
    y.view(positions).addcmul_(q.view(positions), table)
    if bias is not None and response_bias is not None and bias_gate is not None:
        y.view(positions).add_(torch.addcmul(bias, torch.mm(h, bias_gate.T), response_bias)[:, None])
    return y, q


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor | None,
    outer: int,
    inner: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """(dx, dW, db, dR, dr, dGw, dGb, dh), None where `wanted` says so, as `gated_linear.backward` defines them."""
    want_x, want_w, want_b, want_r, want_rb, want_gw, want_gb, want_h = wanted
    positions = (outer, h.shape[0], inner, weight.shape[0])
    per_position = dy.view(positions)

    g = None  # dy ⊙ s
    if want_x or want_r:
        g = (per_position * torch.mm(h, weight_gate.T)[:, None]).view_as(dy)
    dx = torch.mm(dy, weight).addmm_(g, response_weight) if g is not None and want_x else None
    d_weight = torch.mm(dy.T, x) if want_w else None
    d_response_weight = torch.mm(g.T, x) if g is not None and want_r else None

    d_weight_gate = d_bias_gate = d_bias = d_response_bias = dh = None
    if want_gw or want_h:
        assert q is not None
        d_table = (per_position * q.view(positions)).sum((0, 2), dtype=torch.float32).to(dy.dtype)
        d_weight_gate = torch.mm(d_table.T, h) if want_gw else None
        dh = torch.mm(d_table, weight_gate) if want_h else None
    if want_b or want_rb or want_gb or (want_h and response_bias is not None):
        d_offset = per_position.sum((0, 2), dtype=torch.float32)  # dc, (B, O)
        d_bias = d_offset.sum(0).to(dy.dtype) if want_b else None
        if response_bias is not None and bias_gate is not None:
            if want_rb:
                d_response_bias = (d_offset * torch.mm(h, bias_gate.T)).sum(0).to(dy.dtype)
            if want_gb or want_h:
                d_bias_table = (d_offset * response_bias).to(dy.dtype)
                d_bias_gate = torch.mm(d_bias_table.T, h) if want_gb else None
                dh = dh.addmm_(d_bias_table, bias_gate) if dh is not None else None
    return dx, d_weight, d_bias, d_response_weight, d_response_bias, d_weight_gate, d_bias_gate, dh
