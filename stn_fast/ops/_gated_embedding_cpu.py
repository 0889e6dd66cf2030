"""gated_embedding on the CPU in float32: lookup, gate and row scale are one pass of the C++ core, backward another."""

from __future__ import annotations

import torch
from torch import Tensor

from stn_fast.ops._gated_embedding_plain import Gradients, Wanted
from stn_fast.ops.memory import address


def forward_core(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
) -> Tensor:
    from stn_fast import _C

    s = h @ weight_gate.T
    e = weight.new_empty(len(tokens), weight.shape[1])
    _C.gated_embedding_forward(
        address(tokens), address(weight), address(response_weight), address(s), address(scale), address(e),
        len(tokens), len(h), inner, weight.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return e


def backward_core(
    de: Tensor,
    tokens: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
    wanted: Wanted,
) -> Gradients:
    from stn_fast import _C

    s = h @ weight_gate.T
    d_weight = torch.zeros_like(response_weight) if wanted.weight else None
    d_response_weight = torch.zeros_like(response_weight) if wanted.response_weight else None
    ds = torch.zeros_like(s) if wanted.weight_gate or wanted.h else None
    _C.gated_embedding_backward(
        address(de), address(tokens), address(response_weight), address(s), address(scale),
        address(d_weight), address(d_response_weight), address(ds),
        len(tokens), len(h), inner, response_weight.shape[1], padding, torch.get_num_threads(),
    )  # fmt: skip
    return Gradients(
        d_weight,
        d_response_weight,
        ds.T @ h if ds is not None and wanted.weight_gate else None,
        ds @ weight_gate if ds is not None and wanted.h else None,
    )
