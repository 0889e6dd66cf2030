"""gated_embedding in plain torch, forward and backward, for what no kernel computes: any dtype, device and size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, Gradients, Wanted, gate_gradients, gradients, rows_of, sum_of_rows, wide

checks_tokens = False


def forward(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
) -> Tensor:
    weight, _, response_weight, _, weight_gate, _, projection = parameters
    table = response_weight if projection is None else projection
    e, response = (F.embedding(tokens, t, padding if padding >= 0 else None) for t in (weight, table))
    if projection is not None:
        response = response @ response_weight.T
    e = e + rows_of(h @ weight_gate.T, outer, inner) * response
    if scale is None:
        return e
    factor = scale[tokens].to(e.dtype)[:, None]
    return torch.where(factor == 0, 0, e) * factor


def backward(
    de: Tensor,
    tokens: Tensor,
    parameters: GatedParameters,
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
    response_weight, weight_gate = parameters.response_weight, parameters.weight_gate
    factor = None if scale is None else scale[tokens].to(de.dtype)[:, None]
    g = de if factor is None else de * factor
    d_scale = None

    def summed(rows: Tensor) -> Tensor:
        if sparse:
            return rows
        return torch.ops.aten.embedding_dense_backward(rows, tokens, response_weight.shape[0], padding, False)

    if wanted.scale:
        response = F.embedding(tokens, response_weight)
        if factor is not None:
            response = torch.where(factor == 0, 0, response)  # 0 · ∞ is no 0, and a dropped row may hold anything
        d_scale = sum_of_rows(g.to(wide(de.dtype)) * response, outer, len(h), inner)
    of_gates = gate_gradients(d_scale, None, parameters, h, wanted)
    return gradients(
        of_gates,
        weight=summed(g) if wanted.weight else None,
        response_weight=summed(g * rows_of(h @ weight_gate.T, outer, inner)) if wanted.response_weight else None,
    )
