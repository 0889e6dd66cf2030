"""gated_linear on the CPU: in plain torch for any dtype, and around the C++ core for float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops._core import address


class Gradients(NamedTuple):
    """One entry for every tensor that `gated_linear` takes, in its order; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    response_weight: Tensor | None
    response_bias: Tensor | None
    weight_gate: Tensor | None
    bias_gate: Tensor | None
    h: Tensor | None


class Wanted(NamedTuple):
    """Which of the `Gradients` to compute."""

    x: bool
    weight: bool
    bias: bool
    response_weight: bool
    response_bias: bool
    weight_gate: bool
    bias_gate: bool
    h: bool


def _rows(per_example: Tensor, outer: int, inner: int) -> Tensor:
    """(B, O) → (outer·B·inner, O): every example's row at each of its positions."""
    if outer == inner == 1:
        return per_example
    batch, outputs = per_example.shape
    return per_example[None, :, None].expand(outer, batch, inner, outputs).reshape(outer * batch * inner, outputs)


def _examples(per_row: Tensor, outer: int, batch: int, inner: int) -> Tensor:
    """(outer·B·inner, O) → (B, O): the sum over the positions of every example."""
    if outer == inner == 1:
        return per_row
    return per_row.view(outer, batch, inner, per_row.shape[1]).sum((0, 2))


def forward_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
) -> tuple[Tensor, Tensor]:
    q = x @ response_weight.T
    y = F.linear(x, weight, bias) + _rows(h @ weight_gate.T, outer, inner) * q
    if response_bias is not None and bias_gate is not None:
        y = y + _rows((h @ bias_gate.T) * response_bias, outer, inner)
    return y, q


def backward_plain(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    """The formulas, and of them only what is wanted."""
    dx = d_bias = d_response_weight = d_response_bias = d_weight_gate = d_bias_gate = dh = None
    if wanted.x or wanted.response_weight:
        g = dy * _rows(h @ weight_gate.T, outer, inner)
        dx = dy @ weight + g @ response_weight if wanted.x else None
        d_response_weight = g.T @ x if wanted.response_weight else None
    # Sums over positions, then over examples: 16-bit operands would be rounded twice, so these run in float32.
    wide = torch.promote_types(dy.dtype, torch.float32)
    wide_h = h.to(wide)
    if wanted.weight_gate or wanted.h:
        ds = _examples(dy.to(wide) * q, outer, len(h), inner)
        d_weight_gate = ds.T @ wide_h if wanted.weight_gate else None
        dh = ds @ weight_gate.to(wide) if wanted.h else None
    asked = wanted.bias or wanted.response_bias or wanted.bias_gate or wanted.h
    if response_bias is not None and bias_gate is not None and asked:
        dc = _examples(dy.to(wide), outer, len(h), inner)
        d_bias = dc.sum(0) if wanted.bias else None
        d_response_bias = (dc * (wide_h @ bias_gate.to(wide).T)).sum(0) if wanted.response_bias else None
        d_bias_gate = (dc * response_bias).T @ wide_h if wanted.bias_gate else None
        dh = dh + (dc * response_bias) @ bias_gate.to(wide) if dh is not None else None

    def narrow(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.to(dy.dtype)

    return Gradients(
        x=dx,
        weight=dy.T @ x if wanted.weight else None,
        bias=narrow(d_bias),
        response_weight=d_response_weight,
        response_bias=narrow(d_response_bias),
        weight_gate=narrow(d_weight_gate),
        bias_gate=narrow(d_bias_gate),
        h=narrow(dh),
    )


def forward_core(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """Two library products, no copy of the weights, then one fused pass over their results."""
    from stn_fast import _C

    y, q = torch.mm(x, weight.T), torch.mm(x, response_weight.T)
    _C.gated_epilogue_forward(
        y.data_ptr(), q.data_ptr(), h.data_ptr(), weight_gate.data_ptr(),
        address(bias), address(response_bias), address(bias_gate),
        outer, h.shape[0], inner, weight.shape[0], h.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y, q


def backward_core(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    """Block by block of rows, one fused pass over dy and q and then the products that use them.

    A block's dy, g = dy ⊙ s, x and dx are used again while they are in the cache, and g never fills memory of its
    own: as a whole it is fresh pages every time, whose faults cost more than the arithmetic on them. A block holds
    at least twice what dR does, so that adding up dW and dR costs less than g would have.
    """
    from stn_fast import _C

    def out(like: Tensor | None, wants: bool) -> Tensor | None:
        return torch.empty_like(like) if wants and like is not None else None

    outputs = dy.shape[1]
    most = max(_BLOCK, 2 * weight.numel()) // outputs
    d_bias = dy.new_empty(outputs) if wanted.bias else None
    d_weight_gate, d_bias_gate = out(weight_gate, wanted.weight_gate), out(bias_gate, wanted.bias_gate)
    d_response_bias, d_h = out(response_bias, wanted.response_bias), out(h, wanted.h)
    dx, d_weight = out(x, wanted.x), out(weight, wanted.weight)
    d_response_weight = out(response_weight, wanted.response_weight)
    needs_g = wanted.x or wanted.response_weight
    buffer = dy.new_empty(min(len(dy), max(most, inner)), outputs) if needs_g else None

    sums = tuple(address(t) for t in (d_weight_gate, d_bias, d_response_bias, d_bias_gate))
    constants = (weight_gate.data_ptr(), address(response_bias), address(bias_gate))
    epilogue: Callable[..., None] = _C.gated_epilogue_backward
    for rows, examples, turns in row_blocks(outer, len(h), inner, most):
        of_dy, of_x, of_h, of_q = dy[rows], x[rows], h[examples], q[rows]
        g = None if buffer is None else buffer[: len(of_dy)]
        inputs = (of_dy.data_ptr(), of_q.data_ptr(), of_h.data_ptr(), *constants)
        sizes = (turns, len(of_h), inner, outputs, h.shape[1])
        if g is not None or any(sums):
            epilogue(*inputs, address(g), *sums, 0, *sizes, rows.start > 0, torch.get_num_threads())
        if d_h is not None:  # apart from the sums, which would crowd its tiles out of the cache
            again = rows.start >= len(h) * inner
            epilogue(*inputs, 0, 0, 0, 0, 0, d_h[examples].data_ptr(), *sizes, again, torch.get_num_threads())
        if dx is not None and g is not None:
            torch.mm(of_dy, weight, out=dx[rows]).addmm_(g, response_weight)
        for total, factor in ((d_weight, of_dy), (d_response_weight, g)):
            if total is not None and factor is not None:
                torch.addmm(total, factor.T, of_x, beta=rows.start > 0, out=total)
    return Gradients(
        x=dx,
        weight=d_weight,
        bias=d_bias,
        response_weight=d_response_weight,
        response_bias=d_response_bias,
        weight_gate=d_weight_gate,
        bias_gate=d_bias_gate,
        h=d_h,
    )


_BLOCK = 1 << 19  # numbers: a buffer of 2 MiB


def row_blocks(outer: int, batch: int, inner: int, most: int) -> Iterator[tuple[slice, slice, int]]:
    """Consecutive (rows, their examples, how often those repeat) of about `most` rows of (outer, batch, inner).

    Whole turns through the batch where at least one fits, else some examples of one turn.
    """
    turn = batch * inner
    if turn <= most:
        for first in range(0, outer, most // turn):
            turns = min(most // turn, outer - first)
            yield slice(first * turn, (first + turns) * turn), slice(0, batch), turns
        return
    step = max(1, most // inner)
    for first in range(0, outer * turn, turn):
        for b in range(0, batch, step):
            last = min(b + step, batch)
            yield slice(first + b * inner, first + last * inner), slice(b, last), 1
