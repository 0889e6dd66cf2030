"""Products of float32 matrices on the CPU by the faster of torch's two libraries.

`torch.mm` calls MKL on x86-64. On AMD processors with AVX-512, oneDNN's product took .60 to .95 of its time for x Wᵀ
and dy W, and .65 to .75 for dyᵀ x of many rows (benchmarks/README.md), so oneDNN is used there. torch itself only
calls these products of oneDNN in compiled code. They assume as many threads as OpenMP promises, and leave part of the
result unwritten if they get fewer. So `full_team` is checked before each choice, and torch.mm, which is always right,
is used without a full team. Otherwise the choice only depends on the processor, so that results on a machine don't
change from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stn_fast.ops.openmp import full_team


def library() -> str:
    """The library to use now: "oneDNN", or "torch.mm" and the library that it calls."""
    return "oneDNN" if full_team() and _prefers_onednn() else "torch.mm"


def description() -> str:
    """`library()`, and the reason if oneDNN can't be used."""
    return library() + ("" if full_team() else ", as OpenMP gives fewer threads than torch.get_num_threads()")


@cache
def _prefers_onednn() -> bool:
    """Whether oneDNN's products are available, and faster on this processor."""
    from stn_fast import _C

    return _C.vendor() == "amd" and _C.isa() == "x86-64-v4" and offers_onednn()


@cache
def offers_onednn() -> bool:
    """Whether torch has these products of oneDNN, which are internal functions; tested once, on exact numbers."""
    given: dict[str, Any] = dict(dtype=torch.float32, device="cpu")  # independent of torch's default dtype and device
    x, weight, other = torch.eye(3, **given), torch.arange(12, **given).view(4, 3), torch.ones(3, 4, **given)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 3)
        results = (
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
            torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add") - other,
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.equal(result, weight.T) for result in results)


def times_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b of x (M, K), W (O, K) and b (O,)."""
    if library() == "oneDNN":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def both_times_transpose(x: Tensor, weight: Tensor, response_weight: Tensor) -> tuple[Tensor, Tensor]:
    """x Wᵀ and x Rᵀ of x (M, K) and W, R (O, K)."""
    if library() == "oneDNN":
        multiply = torch.ops.mkldnn._linear_pointwise
        return multiply(x, weight, None, "none", [], ""), multiply(x, response_weight, None, "none", [], "")
    return torch.mm(x, weight.T), torch.mm(x, response_weight.T)


def sum_of_two(dy: Tensor, weight: Tensor, g: Tensor, response_weight: Tensor, out: Tensor) -> Tensor:
    """out ← dy W + g R of dy, g (M, O) and W, R (O, K)."""
    if library() == "oneDNN":
        first = torch.ops.mkldnn._linear_pointwise(dy, weight.T, None, "none", [], "")
        return out.copy_(torch.ops.mkldnn._linear_pointwise.binary(g, first, response_weight.T, None, "add"))
    return torch.mm(dy, weight, out=out).addmm_(g, response_weight)


_MANY_ROWS = 1024  # from which oneDNN is the faster one for a sum over rows too


class SumOverRows:
    """dyᵀ x of dy (M, O) and x (M, K), block by block of rows: the gradient of a weight (O, K)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._transposed = False  # as oneDNN makes it, xᵀ dy: it copies its first factor, and x has the shorter rows

    def add(self, dy: Tensor, x: Tensor) -> None:
        """Adds the rows of one block, both contiguous."""
        if self._sum is None:
            self._transposed = len(x) >= _MANY_ROWS and library() == "oneDNN"
            if self._transposed:
                self._sum = torch.ops.mkldnn._linear_pointwise(x.T, dy.T, None, "none", [], "")
            else:
                self._sum = torch.mm(dy.T, x)
        elif not self._transposed:
            self._sum.addmm_(dy.T, x)
        elif len(x) >= _MANY_ROWS and library() == "oneDNN":
            self._sum = torch.ops.mkldnn._linear_pointwise.binary(x.T, self._sum, dy.T, None, "add")
        else:
            self._sum.addmm_(x.T, dy)

    def total(self) -> Tensor | None:
        """(O, K), contiguous; None of no block."""
        if self._sum is None or not self._transposed:
            return self._sum
        return self._sum.T.contiguous()


_LARGE = 1 << 20  # size of a weight below which it stays in the caches, so that packing it does not pay off


def many_times_transpose(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """A function x (rows, I) → x Wᵀ for many x, with W (O, I). Each result may overwrite the last one.

    With few rows, a library product spends much of its time on packing the weight; oneDNN accepts a packed weight.
    """
    if weight.numel() > _LARGE and full_team() and offers_onednn():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    out, transposed = weight.new_empty(rows, len(weight)), weight.T
    return lambda x: torch.mm(x, transposed, out=out)
