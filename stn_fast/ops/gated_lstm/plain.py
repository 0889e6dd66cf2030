"""The recurrence of gated_lstm in plain torch, step by step, for what no kernel computes: any dtype and device.

A step of 16-bit numbers is computed in float32 and rounded once. As `over_time.Backend` describes it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from stn_fast.ops import gated_linear
from stn_fast.ops.gated_lstm.over_time import Recurrence, RecurrenceGradients, in_time
from stn_fast.ops.gates import wide


def linear(h: Tensor) -> ModuleType:
    return gated_linear.plain


def forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    reverse: bool,
    save: bool,
    save_response: bool,
    projection: Tensor | None,
) -> Recurrence:
    exact = wide(gates.dtype)
    y = gates.new_empty(*gates.shape[:2], h_0.shape[1])
    cells = torch.empty_like(y) if save else None
    response = None
    if save_response and response_weight is not None:
        width = len(response_weight) if projection is None else len(projection)
        response = gates.new_empty(*gates.shape[:2], width)
    hidden, cell = h_0, c_0
    for t in in_time(len(gates), reverse):
        before = gates[t].to(exact) + hidden @ weight.T
        if response_weight is not None and scale is not None:
            u = hidden if projection is None else hidden @ projection.T
            q = u @ response_weight.T
            before = torch.addcmul(before, scale.to(exact), q.to(exact))
        i, f, g, o = (before if shift is None else before + shift).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        exact_cell = f * cell + i * g
        cell, hidden = exact_cell.to(c_0.dtype), y[t].copy_(o * exact_cell.tanh())
        if cells is not None:
            cells[t] = cell
            gates[t] = torch.cat([i, f, g, o], dim=-1)
        if response is not None:
            response[t] = q if projection is None else u
    return Recurrence(y, cell, cells, response)


def backward(
    dy: Tensor,
    d_last_cell: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor | None,
    scale: Tensor | None,
    reverse: bool,
    wants_h_0: bool,
    projection: Tensor | None,
) -> RecurrenceGradients:
    # The gradient of the cell state is handed from step to step, a sum of many terms: in float32 at least.
    exact = wide(gates.dtype)
    d_gates = list(gates)  # replaced step by step; writing into one tensor would fail under vmap
    dc = torch.zeros_like(c_0, dtype=exact) if d_last_cell is None else d_last_cell.to(exact)
    dh = torch.zeros_like(c_0)
    order = in_time(len(gates), reverse)
    for position in range(len(gates) - 1, -1, -1):
        t = order[position]
        c_before = cells[order[position - 1]] if position else c_0
        i, f, g, o = gates[t].to(exact).chunk(4, -1)
        d_h, tanh_c = dy[t].to(exact) + dh, cells[t].to(exact).tanh()
        d_c = dc + d_h * o * (1 - tanh_c * tanh_c)
        d_i, d_f = d_c * g * i * (1 - i), d_c * c_before * f * (1 - f)
        d_g, d_o = d_c * i * (1 - g * g), d_h * tanh_c * o * (1 - o)
        before = torch.cat([d_i, d_f, d_g, d_o], dim=-1)
        d_gates[t] = before.to(gates.dtype)
        dc = d_c * f
        if position or wants_h_0:
            dh = d_gates[t] @ weight
            if response_weight is not None and scale is not None:
                dq = (before * scale).to(dh.dtype)
                du, back = (dq, response_weight) if projection is None else (dq @ response_weight, projection)
                dh = torch.addmm(dh, du, back)
    return RecurrenceGradients(torch.stack(d_gates), dh if wants_h_0 else None, dc)


def tangent(
    d_before: Tensor,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    d_h_0: Tensor | None,
    d_c_0: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    exact = wide(gates.dtype)
    order = in_time(len(gates), reverse)
    dy = list(cells)  # replaced step by step
    dh = d_h_0
    dc = torch.zeros_like(c_0, dtype=exact) if d_c_0 is None else d_c_0.to(exact)
    for position, t in enumerate(order):
        c_before = (cells[order[position - 1]] if position else c_0).to(exact)
        before = d_before[t] if dh is None else d_before[t] + dh @ weight.T
        i, f, g, o = gates[t].to(exact).chunk(4, -1)
        d_i, d_f, d_g, d_o = before.to(exact).chunk(4, -1)
        tanh_c = cells[t].to(exact).tanh()
        dc = f * dc + c_before * f * (1 - f) * d_f + g * i * (1 - i) * d_i + i * (1 - g * g) * d_g
        dh = (tanh_c * o * (1 - o) * d_o + o * (1 - tanh_c * tanh_c) * dc).to(gates.dtype)
        dy[t] = dh
    return torch.stack(dy), dc.to(c_0.dtype)
