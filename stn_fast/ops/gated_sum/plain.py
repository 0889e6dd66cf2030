"""gated_sum in plain torch, for any dtype, device and size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stn_fast.ops.gates import rows_of, sum_of_rows, wide


def forward(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    outer: int,
    inner: int,
) -> Tensor:
    dtype = wide(q.dtype)
    h = h.to(dtype)
    y = rows_of(h @ weight_gate.to(dtype).T, outer, inner) * q
    if p is not None:
        y = p + y
    if response_bias is not None and bias_gate is not None:
        y = y + rows_of((h @ bias_gate.to(dtype).T) * response_bias, outer, inner)
    return y.to(q.dtype)


def backward(
    dy: Tensor,
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of q, Gw, r, Gb and h; sums over examples in float32 or wider."""
    wants_q, wants_weight_gate, *_, wants_h = wanted
    dq = dy * rows_of(h @ weight_gate.T, outer, inner) if wants_q else None
    exact = wide(dy.dtype)
    wide_h, wide_dy = h.to(exact), dy.to(exact)
    d_weight_gate = d_response_bias = d_bias_gate = dh = None
    if wants_weight_gate or wants_h:
        d_scale = sum_of_rows(wide_dy * q, outer, len(h), inner)
        d_weight_gate = d_scale.T @ wide_h
        dh = d_scale @ weight_gate.to(exact)
    if response_bias is not None and bias_gate is not None:
        d_shift = sum_of_rows(wide_dy, outer, len(h), inner)
        gate, bias = bias_gate.to(exact), response_bias.to(exact)
        d_response_bias = (d_shift * (wide_h @ gate.T)).sum(0)
        d_gated = d_shift * bias
        d_bias_gate = d_gated.T @ wide_h
        dh = torch.addmm(dh, d_gated, gate) if dh is not None else None
    found = (d_weight_gate, d_response_bias, d_bias_gate, dh)
    return dq, *(
        d.to(dy.dtype) if d is not None and wants else None for d, wants in zip(found, wanted[1:], strict=True)
    )
