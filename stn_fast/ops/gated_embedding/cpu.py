"""gated_embedding on the CPU in float32: lookup, gate and row scale are one pass of the C++ core, backward another."""

from __future__ import annotations

import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, Gradients, Wanted, gate_gradients, gradients
from stn_fast.ops.memory import address

checks_tokens = False


def forward(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
) -> Tensor:
    from stn_fast import _C

    weight, response_weight, weight_gate = parameters.weight, parameters.response_weight, parameters.weight_gate
    s = h @ weight_gate.T
    e = weight.new_empty(len(tokens), weight.shape[1])
    _C.gated_embedding_forward(
        address(tokens), address(weight), address(response_weight), address(s), address(scale), address(e),
        len(tokens), len(h), inner, weight.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return e


def backward(
    de: Tensor,
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
    sparse: bool,
    wanted: Wanted,
) -> Gradients:
    """Gradients of the tables are dense; sparse ones are left to `plain`."""
    from stn_fast import _C

    response_weight, weight_gate = parameters.response_weight, parameters.weight_gate
    s = h @ weight_gate.T
    d_weight = torch.zeros_like(response_weight) if wanted.weight else None
    d_response_weight = torch.zeros_like(response_weight) if wanted.response_weight else None
    d_scale = torch.zeros_like(s) if wanted.scale else None
    _C.gated_embedding_backward(
        address(de), address(tokens), address(response_weight), address(s), address(scale),
        address(d_weight), address(d_response_weight), address(d_scale),
        len(tokens), len(h), inner, response_weight.shape[1], padding, torch.get_num_threads(),
    )  # fmt: skip
    of_gates = gate_gradients(d_scale, None, parameters, h, wanted)
    return gradients(
        of_gates,
        weight=d_weight,
        response_weight=d_response_weight,
    )
