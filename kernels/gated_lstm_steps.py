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


def _packed(weight: Tensor, response_weight: Tensor) -> Tensor:
    """[W; R], each gate of each padded to (row, row) with zeros: (8·row, row)."""
    hidden = weight.shape[1]
    row = ceil_div(hidden, ROW) * ROW
    if row == hidden:
        return torch.cat([weight, response_weight])
    both = weight.new_zeros(2, GATES, row, row)
    for of_branch, matrix in zip(both, (weight, response_weight), strict=True):
        of_branch[:, :hidden, :hidden] = matrix.view(GATES, hidden, hidden)
    return both.view(2 * GATES * row, row)


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, c_n, cells, response) as in kernels/gated_lstm.py."""
    (steps, batch, _), hidden = gates.shape, h_0.shape[1]
    y = gates.new_empty(steps, batch, hidden)
    cells = torch.empty_like(y) if save else None
    response = torch.empty_like(gates) if save_response else None
    weights = _packed(weight, response_weight)
    wide, row = weights.shape
    h, products = h_0.new_zeros(batch, row), h_0.new_empty(batch, wide)
    h[:, :hidden] = h_0
    cell = c_0.to(torch.float32, copy=True)
    grid, options = _launch_options(batch, row)
    for t in _in_time(steps, reverse):
        torch.mm(h, weights.T, out=products)
        gated_lstm_fwd_step_kernel[grid](
            gates, products, scale, shift, cell, h, y, cells, response, t, batch, hidden, row,
            HAS_SHIFT=shift is not None, SAVE=save, SAVE_RESPONSE=save_response, **options,
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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gates, dh_0, dc_0) as in kernels/gated_lstm.py."""
    steps, batch, hidden = dy.shape
    d_gates = torch.empty_like(gates)
    weights = _packed(weight, response_weight)
    wide, row = weights.shape
    dh, d_both = dy.new_zeros(batch, row), dy.new_zeros(batch, wide)
    dc = torch.zeros_like(c_0, dtype=torch.float32)
    if d_last_cell is not None:
        dc.copy_(d_last_cell)
    grid, options = _launch_options(batch, row)
    order = _in_time(steps, reverse)
    for position in range(steps - 1, -1, -1):
        before = order[position - 1] if position else -1
        gated_lstm_bwd_step_kernel[grid](
            dy, gates, cells, c_0, dh, dc, scale, d_gates, d_both, order[position], before, batch, hidden, row,
            **options,
        )  # fmt: skip
        if position or want_h_0:
            torch.mm(d_both, weights, out=dh)
    return d_gates, dh[:, :hidden].contiguous() if want_h_0 else None, dc
