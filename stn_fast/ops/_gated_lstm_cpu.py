"""The C++ core's part of gated_lstm: float32 on the CPU, as `_gated_lstm_driver.Kernels` describes it.

A time step is one product with [W; R] and one pass of the core around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from stn_fast.ops._core import address
from stn_fast.ops._gated_linear_cpu import backward_core, forward_core
from stn_fast.ops._gated_lstm_driver import Recurrence, RecurrenceGradients, in_time


class Core:
    linear_forward = staticmethod(forward_core)
    linear_backward = staticmethod(backward_core)

    @staticmethod
    def recurrence_forward(
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
    ) -> Recurrence:
        from stn_fast import _C

        (steps, batch, _), hidden, threads = gates.shape, h_0.shape[1], torch.get_num_threads()
        times_weights = _product(torch.cat([weight, response_weight]), batch)
        y = gates.new_empty(steps, batch, hidden)
        cells = torch.empty_like(y) if save else gates.new_empty(1, batch, hidden).expand_as(y)
        response = torch.empty_like(gates) if save_response else None
        h, c = h_0, c_0
        for t in in_time(steps, reverse):
            both = times_weights(h)
            h, c_before, c = y[t], c, cells[t]
            _C.gated_lstm_cell_forward(
                gates[t].data_ptr(), both.data_ptr(), scale.data_ptr(), address(shift), c_before.data_ptr(),
                c.data_ptr(), h.data_ptr(), 0 if response is None else response[t].data_ptr(), batch, hidden, threads,
            )  # fmt: skip
        return Recurrence(y, c.clone(), cells if save else None, response)

    @staticmethod
    def recurrence_backward(
        dy: Tensor,
        d_last_cell: Tensor | None,
        gates: Tensor,
        cells: Tensor,
        c_0: Tensor,
        weight: Tensor,
        response_weight: Tensor,
        scale: Tensor,
        reverse: bool,
        wants_h_0: bool,
    ) -> RecurrenceGradients:
        from stn_fast import _C

        (steps, batch, wide), hidden, threads = gates.shape, c_0.shape[1], torch.get_num_threads()
        d_gates, d_both = torch.empty_like(gates), gates.new_empty(batch, 2 * wide)
        times_weights = _product(torch.cat([weight, response_weight]).T, batch)
        dc = torch.zeros_like(c_0) if d_last_cell is None else d_last_cell.clone(memory_format=torch.contiguous_format)
        dh = None
        order = in_time(steps, reverse)
        for position in range(steps - 1, -1, -1):
            t = order[position]
            c_before = cells[order[position - 1]] if position else c_0
            _C.gated_lstm_cell_backward(
                dy[t].data_ptr(), address(dh), dc.data_ptr(), gates[t].data_ptr(), cells[t].data_ptr(),
                c_before.data_ptr(), scale.data_ptr(), d_gates[t].data_ptr(), d_both.data_ptr(), batch, hidden, threads,
            )  # fmt: skip
            if position or wants_h_0:
                dh = times_weights(d_both)
        return RecurrenceGradients(d_gates, dh if wants_h_0 else None, dc)


_LARGE = 1 << 20  # numbers of a weight: below it is in the caches anyway, and laying it out costs what it gains


def _product(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x (rows, I) → x weightᵀ for many x, weight (O, I). The next result may take the place of the last.

    Of a few rows, much of the time of a library product goes into laying the weight out; oneDNN takes one that is.
    """
    if weight.numel() > _LARGE and packs_weights():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    out, transposed = weight.new_empty(rows, len(weight)), weight.T
    return lambda x: torch.mm(x, transposed, out=out)


@cache
def packs_weights() -> bool:
    """Whether torch has these products of oneDNN, which are internal to it: tried once, on numbers that are exact."""
    x, weight = torch.eye(3), torch.arange(12.0).view(4, 3)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), weight.T)
    except (AttributeError, RuntimeError, TypeError):
        return False
