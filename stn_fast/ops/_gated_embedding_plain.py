"""gated_embedding in plain torch, forward and backward, for what no kernel computes: any dtype, device and size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops._gated_linear_plain import _examples, _rows


class Gradients(NamedTuple):
    """One entry for every tensor of `gated_embedding` that has a gradient, in its order; None where not wanted."""

    weight: Tensor | None
    response_weight: Tensor | None
    weight_gate: Tensor | None
    h: Tensor | None


class Wanted(NamedTuple):
    """Which of the `Gradients` to compute."""

    weight: bool
    response_weight: bool
    weight_gate: bool
    h: bool


def forward_plain(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
) -> Tensor:
    plain, response = (F.embedding(tokens, t, padding if padding >= 0 else None) for t in (weight, response_weight))
    e = plain + _rows(h @ weight_gate.T, outer, inner) * response
    if scale is None:
        return e
    factor = scale[tokens].to(e.dtype)[:, None]
    return torch.where(factor == 0, 0, e) * factor


def backward_plain(
    de: Tensor,
    tokens: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
    sparse: bool,
    wanted: Wanted,
) -> Gradients:
    """The formulas, and of them only what is wanted.

    Rows of E and R add up over the positions of a word. `sparse` leaves that to the caller: their gradients are then
    what each position contributes, (positions, D).
    """
    factor = None if scale is None else scale[tokens].to(de.dtype)[:, None]
    g = de if factor is None else de * factor
    d_weight = d_response_weight = d_weight_gate = dh = None

    def summed(rows: Tensor) -> Tensor:
        if sparse:
            return rows
        return torch.ops.aten.embedding_dense_backward(rows, tokens, response_weight.shape[0], padding, False)

    if wanted.weight:
        d_weight = summed(g)
    if wanted.response_weight:
        d_response_weight = summed(g * _rows(h @ weight_gate.T, outer, inner))
    if wanted.weight_gate or wanted.h:
        # Sums over positions, then over examples: 16-bit operands would be rounded twice, so these run in float32.
        wide = torch.promote_types(de.dtype, torch.float32)
        response = F.embedding(tokens, response_weight)
        if factor is not None:
            response = torch.where(factor == 0, 0, response)  # 0 · ∞ is no 0, and a dropped row may hold anything
        ds = _examples(g.to(wide) * response, outer, len(h), inner)
        d_weight_gate = (ds.T @ h.to(wide)).to(de.dtype) if wanted.weight_gate else None
        dh = (ds @ weight_gate.to(wide)).to(de.dtype) if wanted.h else None
    return Gradients(d_weight, d_response_weight, d_weight_gate, dh)
