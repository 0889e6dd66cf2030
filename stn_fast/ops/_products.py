"""Products of float32 matrices on the CPU, by the faster of the two libraries that torch has for them.

`torch.mm` calls MKL on x86-64. On AMD's processors with AVX-512, oneDNN's product took .60 to .95 of its time for x Wᵀ
and dy W (benchmarks/README.md), so it is called there. The choice depends on the processor alone: results of a
machine don't change from run to run.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def library() -> str:
    """What computes them here: "oneDNN", or "torch.mm" and what stands behind it."""
    from stn_fast import _C

    measured = _C.vendor() == "amd" and _C.isa() == "x86-64-v4"
    offered = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return "oneDNN" if measured and offered else "torch.mm"


def times_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of x (M, K) and W (O, K)."""
    if library() == "oneDNN":
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.mm(x, weight.T)


def sum_of_two(dy: Tensor, weight: Tensor, g: Tensor, response_weight: Tensor, out: Tensor) -> Tensor:
    """out ← dy W + g R of dy, g (M, O) and W, R (O, K)."""
    if library() == "oneDNN":
        first = torch.ops.mkldnn._linear_pointwise(dy, weight.T, None, "none", [], "")
        return out.copy_(torch.ops.mkldnn._linear_pointwise.binary(g, first, response_weight.T, None, "add"))
    return torch.mm(dy, weight, out=out).addmm_(g, response_weight)
