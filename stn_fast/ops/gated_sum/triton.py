"""gated_sum by the passes of stn_fast.kernels.gated_linear."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stn_fast.kernels import gated_linear as kernels
from stn_fast.ops.gated_linear.triton import why_not as why_not


def forward(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    outer: int,
    inner: int,
) -> Tensor:
    return kernels.gated_sum(q, weight_gate, response_bias, bias_gate, h, p, inner)


def backward(
    dy: Tensor,
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    return kernels.gated_sum_backward(dy, q, weight_gate, response_bias, bias_gate, h, inner, wanted)
