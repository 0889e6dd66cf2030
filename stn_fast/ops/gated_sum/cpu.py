"""gated_sum by the C++ core: float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stn_fast.ops.memory import address, own_address


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
    from stn_fast import _C

    y = torch.zeros_like(q) if p is None else p.clone()
    no_bias = None if response_bias is None else torch.zeros_like(response_bias)
    _C.gated_epilogue_forward(
        own_address(y), address(q), address(h), address(weight_gate),
        address(no_bias), address(response_bias), address(bias_gate),
        outer, len(h), inner, q.shape[1], h.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y


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
    """The gradients of q, Gw, r, Gb and h in one pass over dy and q, and that of h in another."""
    from stn_fast import _C

    likes = (q, weight_gate, response_bias, bias_gate, h)
    found = [torch.empty_like(t) if wants and t is not None else None for t, wants in zip(likes, wanted, strict=True)]
    dq, d_weight_gate, d_response_bias, d_bias_gate, dh = map(own_address, found)
    constants = (address(dy), address(q), address(h), address(weight_gate), address(response_bias), address(bias_gate))
    sizes, threads = (outer, len(h), inner, q.shape[1], h.shape[1]), torch.get_num_threads()
    sums = (dq, d_weight_gate, 0, d_response_bias, d_bias_gate)
    if any(sums):
        _C.gated_epilogue_backward(*constants, *sums, 0, *sizes, False, threads)
    if dh:
        _C.gated_epilogue_backward(*constants, 0, 0, 0, 0, 0, dh, *sizes, False, threads)
    return tuple(found)
