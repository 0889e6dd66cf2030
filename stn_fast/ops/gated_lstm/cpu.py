"""The recurrence of gated_lstm by the C++ core: float32 on the CPU, as `over_time.Backend` describes it.

A time step is one product with [W; R] and one pass of the core around it. With a response of low rank, it is a product
with W and small ones with B and A; in backward, one with [W; B] and a small one with A.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from stn_fast.ops.gated_linear import cpu as gated_linear_cpu
from stn_fast.ops.gated_lstm.over_time import Recurrence, RecurrenceGradients, in_time
from stn_fast.ops.memory import address, own_address
from stn_fast.ops.products import many_times_transpose


def linear(h: Tensor) -> ModuleType:
    return gated_linear_cpu


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
    from stn_fast import _C

    (steps, batch, wide), hidden, threads = gates.shape, h_0.shape[1], torch.get_num_threads()
    for given in (gates, h_0, c_0, scale):
        address(given)  # raises where it can't be read
    second = response_weight if projection is None else projection
    joined = weight if response_weight is None or projection is not None else torch.cat([weight, response_weight])
    times_weights = many_times_transpose(joined, batch)
    y = gates.new_empty(steps, batch, hidden)
    cells = torch.empty_like(y) if save else gates.new_empty(1, batch, hidden).expand_as(y)
    response = gates.new_empty(steps, batch, len(second)) if save_response and second is not None else None
    of_low_rank = (
        None if projection is None else (gates.new_empty(batch, len(projection)), gates.new_empty(batch, wide))
    )
    h, c = h_0, c_0
    for t in in_time(steps, reverse):
        both = times_weights(h)
        kept = None if response is None else response[t]
        q = None if second is None else both[:, wide:]
        if of_low_rank is not None and projection is not None and response_weight is not None:
            # by torch.mm, which is more accurate than a packed product, because A amplifies the error of u
            u = torch.mm(h, projection.T, out=of_low_rank[0] if kept is None else kept)
            q, kept = torch.mm(u, response_weight.T, out=of_low_rank[1]), None
        q_row = both.shape[1] if q is None else q.stride(0)
        h, c_before, c = y[t], c, cells[t]
        _C.gated_lstm_cell_forward(
            own_address(gates[t]), own_address(both), own_address(q), own_address(scale), address(shift),
            own_address(c_before), own_address(c), own_address(h), own_address(kept),
            both.shape[1], q_row, batch, hidden, threads,
        )  # fmt: skip
    return Recurrence(y, c.clone(), cells if save else None, response)


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
    from stn_fast import _C

    (steps, batch, wide), hidden, threads = gates.shape, c_0.shape[1], torch.get_num_threads()
    for given in (dy, d_last_cell, gates, cells, c_0, scale):
        address(given)  # raises where it can't be read
    second = response_weight if projection is None else projection
    d_gates, d_both, d_q = torch.empty_like(gates), None, None
    if second is not None:
        d_both = gates.new_empty(batch, wide + len(second))
        d_q = d_both[:, wide:] if projection is None else gates.new_empty(batch, wide)
    times_weights = many_times_transpose((weight if second is None else torch.cat([weight, second])).T, batch)
    dc = torch.zeros_like(c_0) if d_last_cell is None else d_last_cell.clone(memory_format=torch.contiguous_format)
    dh = None
    order = in_time(steps, reverse)
    for position in range(steps - 1, -1, -1):
        t = order[position]
        c_before = cells[order[position - 1]] if position else c_0
        _C.gated_lstm_cell_backward(
            own_address(dy[t]), own_address(dh), own_address(dc), own_address(gates[t]), own_address(cells[t]),
            own_address(c_before), own_address(scale), own_address(d_gates[t]), own_address(d_both), own_address(d_q),
            0 if d_both is None else d_both.shape[1], 0 if d_q is None else d_q.stride(0), batch, hidden, threads,
        )  # fmt: skip
        if position or wants_h_0:
            if projection is not None and d_both is not None and d_q is not None and response_weight is not None:
                torch.mm(d_q, response_weight, out=d_both[:, wide:])
            dh = times_weights(d_gates[t] if d_both is None else d_both)
    return RecurrenceGradients(d_gates, dh if wants_h_0 else None, dc)


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
    from stn_fast import _C

    (steps, batch, _), hidden, threads = gates.shape, c_0.shape[1], torch.get_num_threads()
    for given in (d_before, gates, cells, c_0):
        address(given)  # raises where it can't be read
    times_weights = many_times_transpose(weight, batch)
    dy = torch.empty_like(cells)
    dc = torch.zeros_like(c_0) if d_c_0 is None else d_c_0.clone(memory_format=torch.contiguous_format)
    dh = d_h_0
    order = in_time(steps, reverse)
    for position, t in enumerate(order):
        p = None if dh is None else times_weights(dh)
        c_before = cells[order[position - 1]] if position else c_0
        dh = dy[t]
        _C.lstm_cell_tangent(
            own_address(d_before[t]), own_address(p), own_address(gates[t]), own_address(cells[t]),
            own_address(c_before), own_address(dc), own_address(dh), batch, hidden, threads,
        )  # fmt: skip
    return dy, dc
