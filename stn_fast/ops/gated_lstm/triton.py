"""The recurrence of gated_lstm by the kernels of stn_fast.kernels.gated_lstm, as `over_time.Backend` describes it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from stn_fast.kernels import gated_lstm as kernels
from stn_fast.ops.gated_linear import plain, triton
from stn_fast.ops.gated_lstm.over_time import Recurrence, RecurrenceGradients


def linear(h: Tensor) -> ModuleType:
    """Plain torch for more hyperparameters than the kernels hold."""
    return plain if triton.why_not(h) else triton


def forward(*operands: Any) -> Recurrence:
    return Recurrence(*kernels.forward(*operands))


def backward(*operands: Any) -> RecurrenceGradients:
    return RecurrenceGradients(*kernels.backward(*operands))
