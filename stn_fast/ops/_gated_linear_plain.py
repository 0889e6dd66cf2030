"""gated_linear in plain torch, forward and backward, for what no kernel computes: any dtype, device and size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops.openmp import any_team


class Gradients(NamedTuple):
    """One entry for every tensor that `gated_linear` takes, in its order; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    response_weight: Tensor | None
    response_bias: Tensor | None
    weight_gate: Tensor | None
    bias_gate: Tensor | None
    h: Tensor | None


class Wanted(NamedTuple):
    """Which of the `Gradients` to compute."""

    x: bool
    weight: bool
    bias: bool
    response_weight: bool
    response_bias: bool
    weight_gate: bool
    bias_gate: bool
    h: bool


def _rows(per_example: Tensor, outer: int, inner: int) -> Tensor:
    """(B, O) → (outer·B·inner, O): every example's row at each of its positions."""
    if outer == inner == 1:
        return per_example
    batch, outputs = per_example.shape
    return per_example[None, :, None].expand(outer, batch, inner, outputs).reshape(outer * batch * inner, outputs)


def _examples(per_row: Tensor, outer: int, batch: int, inner: int) -> Tensor:
    """(outer·B·inner, O) → (B, O): the sum over the positions of every example."""
    if outer == inner == 1:
        return per_row
    return per_row.view(outer, batch, inner, per_row.shape[1]).sum((0, 2))


@any_team
def forward_plain(
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
    q = x @ response_weight.T
    y = F.linear(x, weight, bias) + _rows(h @ weight_gate.T, outer, inner) * q
    if response_bias is not None and bias_gate is not None:
        y = y + _rows((h @ bias_gate.T) * response_bias, outer, inner)
    return y, q


@any_team
def backward_plain(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    """The formulas, and of them only what is wanted."""
    dx = d_bias = d_response_weight = d_response_bias = d_weight_gate = d_bias_gate = dh = None
    if wanted.x or wanted.response_weight:
        g = dy * _rows(h @ weight_gate.T, outer, inner)
        dx = dy @ weight + g @ response_weight if wanted.x else None
        d_response_weight = g.T @ x if wanted.response_weight else None
    # Sums over positions, then over examples: 16-bit operands would be rounded twice, so these run in float32.
    wide = torch.promote_types(dy.dtype, torch.float32)
    wide_h = h.to(wide)
    if wanted.weight_gate or wanted.h:
        ds = _examples(dy.to(wide) * q, outer, len(h), inner)
        d_weight_gate = ds.T @ wide_h if wanted.weight_gate else None
        dh = ds @ weight_gate.to(wide) if wanted.h else None
    asked = wanted.bias or wanted.response_bias or wanted.bias_gate or wanted.h
    if response_bias is not None and bias_gate is not None and asked:
        dc = _examples(dy.to(wide), outer, len(h), inner)
        d_bias = dc.sum(0) if wanted.bias else None
        d_response_bias = (dc * (wide_h @ bias_gate.to(wide).T)).sum(0) if wanted.response_bias else None
        d_bias_gate = (dc * response_bias).T @ wide_h if wanted.bias_gate else None
        dh = dh + (dc * response_bias) @ bias_gate.to(wide) if dh is not None else None

    def narrow(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.to(dy.dtype)

    return Gradients(
        x=dx,
        weight=dy.T @ x if wanted.weight else None,
        bias=narrow(d_bias),
        response_weight=d_response_weight,
        response_bias=narrow(d_response_bias),
        weight_gate=narrow(d_weight_gate),
        bias_gate=narrow(d_bias_gate),
        h=narrow(dh),
    )
