"""The part of gated_lstm that kernels on a GPU compute, as `_gated_lstm_driver.Kernels` describes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stn_fast.kernels import gated_linear, gated_lstm
from stn_fast.kernels.gates import MAX_N
from stn_fast.ops._gated_linear_plain import Gradients, backward_plain, forward_plain
from stn_fast.ops._gated_lstm_driver import Recurrence, RecurrenceGradients


class Triton:
    """The layer's products over all steps are gated_linear's, in plain torch for more hyperparameters than it holds."""

    def __init__(self, save_response: bool = False) -> None:
        self.save_response = save_response

    def linear_forward(self, *operands: Any) -> tuple[Tensor, Tensor | None]:
        *_, h, outer, inner = operands
        if h.shape[1] > MAX_N:
            return forward_plain(*operands)
        return gated_linear.forward(*operands[:-2], outer, inner, self.save_response)

    def linear_backward(self, *operands: Any) -> Gradients:
        *_, h, _, _, _, _ = operands
        if h.shape[1] > MAX_N:
            return backward_plain(*operands)
        return Gradients(*gated_linear.backward(*operands))

    @staticmethod
    def recurrence_forward(*operands: Any) -> Recurrence:
        return Recurrence(*gated_lstm.forward(*operands))

    @staticmethod
    def recurrence_backward(*operands: Any) -> RecurrenceGradients:
        return RecurrenceGradients(*gated_lstm.backward(*operands))
