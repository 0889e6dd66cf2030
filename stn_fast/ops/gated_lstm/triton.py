"""The recurrence of gated_lstm by the kernels of stn_fast.kernels.gated_lstm, as `over_time.Backend` describes it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from stn_fast.kernels import gated_lstm as kernels
from stn_fast.ops.gated_linear import plain, triton
from stn_fast.ops.gated_lstm.over_time import Recurrence, RecurrenceGradients
from stn_fast.ops.gated_lstm.plain import backward as plain_backward
from stn_fast.ops.gated_lstm.plain import forward as plain_forward
from stn_fast.ops.gated_lstm.plain import tangent as tangent


def linear(h: Tensor) -> ModuleType:
    """Plain torch for more hyperparameters than the kernels hold."""
    return plain if triton.why_not(h) else triton


def forward(*operands: Any) -> Recurrence:
    """Without a response, by plain torch: the tangent's LSTM has no kernels yet."""
    return plain_forward(*operands) if operands[4] is None else Recurrence(*kernels.forward(*operands))


def backward(*operands: Any) -> RecurrenceGradients:
    return plain_backward(*operands) if operands[6] is None else RecurrenceGradients(*kernels.backward(*operands))
