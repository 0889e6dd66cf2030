"""gated_embedding by the kernel of stn_fast.kernels.gated_embedding, forward."""

from __future__ import annotations

from torch import Tensor

from stn_fast.kernels import gated_embedding as kernels
from stn_fast.ops.gated_embedding import plain
from stn_fast.ops.gates import GatedParameters

checks_tokens = True
# torch sums the rows of a word in a fixed order and in float32.
backward = plain.backward


def forward(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
) -> Tensor:
    weight, response_weight, weight_gate = parameters.weight, parameters.response_weight, parameters.weight_gate
    return kernels.forward(tokens, weight, response_weight, weight_gate, h, scale, outer, inner)
