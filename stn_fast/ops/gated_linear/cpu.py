"""gated_linear on the CPU in float32: library products around the C++ core's fused passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, Gradients, Wanted
from stn_fast.ops.memory import address, own_address
from stn_fast.ops.products import SumOverRows, both_times_transpose, sum_of_two


def forward(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> tuple[Tensor, Tensor]:
    """Two library products, no copy of the weights, then one fused pass over their results.

    Of a response of low rank Q = u Aᵀ, u = x Bᵀ, is made block by block of rows, and used while it is in the cache.
    """
    from stn_fast import _C

    weight, bias, response_weight, response_bias, weight_gate, bias_gate, projection = parameters

    def epilogue(y: Tensor, q: Tensor, h: Tensor, turns: int) -> None:
        _C.gated_epilogue_forward(
            own_address(y), own_address(q), address(h), address(weight_gate),
            address(bias), address(response_bias), address(bias_gate),
            turns, len(h), inner, weight.shape[0], h.shape[1], torch.get_num_threads(),
        )  # fmt: skip

    if projection is None:
        y, q = both_times_transpose(x, weight, response_weight)
        epilogue(y, q, h, outer)
        return y, q
    y, u = both_times_transpose(x, weight, projection)
    most = _BLOCK // len(weight)
    buffer = y.new_empty(min(len(y), max(most, inner)), len(weight))
    for rows, examples, turns in row_blocks(outer, len(h), inner, most):
        of_y = y[rows]
        epilogue(of_y, torch.mm(u[rows], response_weight.T, out=buffer[: len(of_y)]), h[examples], turns)
    return y, u


def backward(
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    saved: Tensor,
    outer: int,
    inner: int,
    wanted: Wanted,
) -> Gradients:
    """Block by block of rows, one fused pass over dy and Q and then the products that use them.

    `saved` is Q, or of a response of low rank u, from which Q is made again.

    A block's dy, g = dy ⊙ s, x and dx are used again while they are in the cache, and g never fills memory of its
    own: as a whole it is fresh pages every time, whose faults cost more than the arithmetic on them. A block holds
    at least twice what dR does, so that adding up dW and dR costs less than g would have.
    """
    from stn_fast import _C

    weight, _, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    address(dy)  # raises where it can't be read

    def out(like: Tensor | None, wants: bool) -> Tensor | None:
        return torch.empty_like(like) if wants and like is not None else None

    outputs = dy.shape[1]
    most = max(_BLOCK, 2 * weight.numel()) // outputs
    d_bias = dy.new_empty(outputs) if wanted.bias else None
    d_weight_gate, d_bias_gate = out(weight_gate, wanted.weight_gate), out(bias_gate, wanted.bias_gate)
    d_response_bias, d_h = out(response_bias, wanted.response_bias), out(h, wanted.h)
    dx = out(x, wanted.x)
    of_matrices = {name: SumOverRows() for name in ("weight", "response_weight", "response_projection")}
    needs_u = wanted.x or wanted.response_projection
    needs_g = needs_u or wanted.response_weight
    needs_q = wanted.scale and projection is not None

    def block(wants: bool) -> Tensor | None:
        return dy.new_empty(min(len(dy), max(most, inner)), outputs) if wants else None

    of_g, of_remade = block(needs_g), block(needs_q)

    sums = tuple(own_address(t) for t in (d_weight_gate, d_bias, d_response_bias, d_bias_gate))
    constants = (address(weight_gate), address(response_bias), address(bias_gate))
    epilogue: Callable[..., None] = _C.gated_epilogue_backward
    for rows, examples, turns in row_blocks(outer, len(h), inner, most):
        of_dy, of_x, of_h, of_saved = dy[rows], x[rows], h[examples], saved[rows]
        g = None if of_g is None else of_g[: len(of_dy)]
        of_q = of_saved
        if of_remade is not None:
            of_q = torch.mm(of_saved, response_weight.T, out=of_remade[: len(of_dy)])
        inputs = (address(of_dy), address(of_q), address(of_h), *constants)
        sizes = (turns, len(of_h), inner, outputs, h.shape[1])
        if g is not None or any(sums):
            epilogue(*inputs, own_address(g), *sums, 0, *sizes, rows.start > 0, torch.get_num_threads())
        if d_h is not None:  # apart from the sums, which would crowd its tiles out of the cache
            again = rows.start >= len(h) * inner
            epilogue(*inputs, 0, 0, 0, 0, 0, own_address(d_h[examples]), *sizes, again, torch.get_num_threads())
        # The branch of the response: its input, the gradient of what that is multiplied with, and by what.
        du, back, source = g, response_weight, of_x
        if projection is not None:
            du, back, source = g @ response_weight if g is not None and needs_u else None, projection, of_saved
        if dx is not None and du is not None:
            sum_of_two(of_dy, weight, du, back, out=dx[rows])
        for (name, sums_of_rows), factor, factor_x in zip(
            of_matrices.items(), (of_dy, g, du), (of_x, source, of_x), strict=True
        ):
            if factor is not None and getattr(wanted, name):
                sums_of_rows.add(factor, factor_x)
    return Gradients(
        x=dx,
        weight=of_matrices["weight"].total(),
        bias=d_bias,
        response_weight=of_matrices["response_weight"].total(),
        response_bias=d_response_bias,
        weight_gate=d_weight_gate,
        bias_gate=d_bias_gate,
        response_projection=of_matrices["response_projection"].total(),
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
