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


def _units(hidden: int) -> int:
    """H, padded."""
    return ceil_div(hidden, ROW) * ROW


def _of_gates(matrix: Tensor, hidden: int) -> Tensor:
    """The rows of W, R or A, (4H, columns), with those of each gate padded by zeros: (4·row, columns)."""
    row = _units(hidden)
    if row == hidden:
        return matrix
    padded = matrix.new_zeros(GATES, row, matrix.shape[1])
    padded[:, :hidden] = matrix.view(GATES, hidden, -1)
    return padded.view(GATES * row, -1)


def _of_units(matrix: Tensor, hidden: int) -> Tensor:
    """The columns of W, R or B, (rows, H), padded by zeros: (rows, row)."""
    row = _units(hidden)
    if row == hidden:
        return matrix
    padded = matrix.new_zeros(len(matrix), row)
    padded[:, :hidden] = matrix
    return padded


class _Weights:
    """[W; R], or of a response of low rank [W; B] and A, each gate and each row of units padded."""

    def __init__(self, weight: Tensor, response_weight: Tensor, projection: Tensor | None) -> None:
        hidden = weight.shape[1]
        self.row = _units(hidden)
        self.factor: Tensor | None = None
        second = _of_gates(response_weight, hidden)
        if projection is not None:
            # Rows of A begin at 16 bytes where k is a multiple of ROW, and so do those of [P, u] then.
            rank = ceil_div(len(projection), ROW) * ROW
            self.factor = second.new_zeros(len(second), rank)
            self.factor[:, : len(projection)] = second
            second = projection.new_zeros(rank, hidden)
            second[: len(projection)] = projection
        self.stacked = _of_units(torch.cat([_of_gates(weight, hidden), second]), hidden)

    def buffers(self, like: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a product with `stacked` fills, zeros; P or its gradient in it; Q or its gradient, in it or apart."""
        wide = GATES * self.row
        both = like.new_zeros(batch, len(self.stacked))
        p, second = both[:, :wide], both[:, wide:]
        return both, p, second if self.factor is None else like.new_zeros(batch, wide)


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
    h = h_0.new_zeros(batch, row)
    products, p, q = weights.buffers(h_0, batch)
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
    dh = dy.new_zeros(batch, row)
    d_both, d_p, d_q = weights.buffers(dy, batch)
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
