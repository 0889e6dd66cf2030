"""The C++ core's part of gated_lstm: float32 on the CPU, as `_gated_lstm_driver.Kernels` describes it."""

from __future__ import annotations

import torch
from torch import Tensor

from stn_fast.ops._core import address
from stn_fast.ops._gated_linear_cpu import backward_core, forward_core


class Core:
    linear_forward = staticmethod(forward_core)
    linear_backward = staticmethod(backward_core)

    @staticmethod
    def cell_forward(
        gates: Tensor,
        p: Tensor,
        q: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        c_before: Tensor,
        c: Tensor,
        h: Tensor,
    ) -> None:
        from stn_fast import _C

        _C.gated_lstm_cell_forward(
            gates.data_ptr(), p.data_ptr(), q.data_ptr(), scale.data_ptr(), address(shift), c_before.data_ptr(),
            c.data_ptr(), h.data_ptr(), len(c), c.shape[1], torch.get_num_threads(),
        )  # fmt: skip

    @staticmethod
    def cell_backward(
        dy: Tensor,
        dh: Tensor | None,
        dc: Tensor,
        gates: Tensor,
        c: Tensor,
        c_before: Tensor,
        scale: Tensor,
        d_gates: Tensor,
        d_q: Tensor,
    ) -> None:
        from stn_fast import _C

        _C.gated_lstm_cell_backward(
            dy.data_ptr(), address(dh), dc.data_ptr(), gates.data_ptr(), c.data_ptr(), c_before.data_ptr(),
            scale.data_ptr(), d_gates.data_ptr(), d_q.data_ptr(), len(c), c.shape[1], torch.get_num_threads(),
        )  # fmt: skip
