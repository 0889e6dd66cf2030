"""The recurrence of a gated LSTM step by step: a library product and a kernel at each, for every size and dtype.

What a step hands to the next is kept in private buffers whose rows are padded to multiples of ROW numbers, so that
every row begins at 16 bytes: library products and loads of whole vectors are fast there, and H is any number.
"""

import torch
from torch import Tensor

from .gated_lstm_cell import STEP_CONFIG, gated_lstm_bwd_step_kernel, gated_lstm_fwd_step_kernel
from .launch import ceil_div

ROW = 8
GATES = 4


class _Weights:
    """[W; R], or [W; B] and A of a low-rank response, with each gate and each row of units padded by zeros."""

    def __init__(self, weight: Tensor, response_weight: Tensor, projection: Tensor | None) -> None:
        hidden = weight.shape[1]
        row = self.row = ceil_div(hidden, ROW) * ROW
        self.factor: Tensor | None = None
        if projection is None and row == hidden:
            self.stacked = torch.cat([weight, response_weight])
            return
        # Rows of [P, u] begin at 16 bytes if the rank is padded too.
        rank = 0 if projection is None else ceil_div(len(projection), ROW) * ROW
        wide = GATES * row
        self.stacked = weight.new_zeros(wide + (rank or wide), row)
        of_gates = (GATES, row, row)
        self.stacked[:wide].view(of_gates)[:, :hidden, :hidden] = weight.view(GATES, hidden, hidden)
        if projection is None:
            self.stacked[wide:].view(of_gates)[:, :hidden, :hidden] = response_weight.view(GATES, hidden, hidden)
            return
        self.stacked[wide : wide + len(projection), :hidden] = projection
        factor = weight.new_zeros(GATES, row, rank)
        factor[:, :hidden, : len(projection)] = response_weight.view(GATES, hidden, -1)
        self.factor = factor.view(wide, rank)

    def buffers(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """P and Q, or their gradients, as parts of `both`, a product with `stacked`; with a factor, Q is apart."""
        p, second = both.split([GATES * self.row, len(self.stacked) - GATES * self.row], dim=1)
        return p, second if self.factor is None else torch.zeros_like(p, memory_format=torch.contiguous_format)


def _launch_options(batch: int, row: int) -> tuple[tuple[int], dict[str, object]]:
    grid = (ceil_div(batch * row, STEP_CONFIG.kwargs["BLOCK"]),)
    return grid, {**STEP_CONFIG.kwargs, "num_warps": STEP_CONFIG.num_warps}


def _in_time(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    reverse: bool,
    save: bool,
    save_response: bool,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, c_n, cells, response) as in kernels/gated_lstm.py."""
    (steps, batch, _), hidden = gates.shape, h_0.shape[1]
    y = gates.new_empty(steps, batch, hidden)
    cells = torch.empty_like(y) if save else None
    weights = _Weights(weight, response_weight, projection)
    row, rank = weights.row, 0 if projection is None else len(projection)
    response = gates.new_empty(steps, batch, rank or gates.shape[2]) if save_response else None
    h, products = h_0.new_zeros(batch, row), h_0.new_empty(batch, len(weights.stacked))
    p, q = weights.buffers(products)
    u = products[:, p.shape[1] :]
    h[:, :hidden] = h_0
    cell = c_0.to(torch.float32, copy=True)
    grid, options = _launch_options(batch, row)
    for t in _in_time(steps, reverse):
        torch.mm(h, weights.stacked.T, out=products)
        if weights.factor is not None:
            torch.mm(u, weights.factor.T, out=q)
            if response is not None:
                response[t] = u[:, :rank]
        gated_lstm_fwd_step_kernel[grid](
            gates, p, q, scale, shift, cell, h, y, cells, response, t, batch, hidden, row, p.stride(0), q.stride(0),
            HAS_SHIFT=shift is not None, SAVE=save, SAVE_RESPONSE=save_response and not rank, **options,
        )  # fmt: skip
    return y, cell.to(y.dtype), cells, response


def backward(
    dy: Tensor,
    d_last_cell: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    reverse: bool,
    want_h_0: bool,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gates, dh_0, dc_0) as in kernels/gated_lstm.py."""
    steps, batch, hidden = dy.shape
    d_gates = torch.empty_like(gates)
    weights = _Weights(weight, response_weight, projection)
    row = weights.row
    dh, d_both = dy.new_zeros(batch, row), dy.new_zeros(batch, len(weights.stacked))
    d_p, d_q = weights.buffers(d_both)
    du = d_both[:, d_p.shape[1] :]
    dc = torch.zeros_like(c_0, dtype=torch.float32)
    if d_last_cell is not None:
        dc.copy_(d_last_cell)
    grid, options = _launch_options(batch, row)
    order = _in_time(steps, reverse)
    for position in range(steps - 1, -1, -1):
        before = order[position - 1] if position else -1
        gated_lstm_bwd_step_kernel[grid](
            dy, gates, cells, c_0, dh, dc, scale, d_gates, d_p, d_q, order[position], before, batch, hidden, row,
            d_p.stride(0), d_q.stride(0), **options,
        )  # fmt: skip
        if position or want_h_0:
            if weights.factor is not None:
                torch.mm(d_q, weights.factor, out=du)
            torch.mm(d_both, weights.stacked, out=dh)
    return d_gates, dh[:, :hidden].contiguous() if want_h_0 else None, dc
