"""The recurrence of a gated LSTM in plain torch, for any dtype, and operands for it and for a layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from numerics import assert_twice_as_good
from torch import Tensor

from stn_fast.ops.gates import GatedParameters

DIFFERENTIATED = ("d_gates", "dh_0", "dc_0")


class Operands(NamedTuple):
    """x's share of the gates (T, B, 4H), the state before, W, R, scale, shift; and the gradients of y and c_n."""

    share: Tensor
    h_0: Tensor
    c_0: Tensor
    weight: Tensor
    response_weight: Tensor
    scale: Tensor
    shift: Tensor | None
    dy: Tensor
    d_last_cell: Tensor | None

    def to(self, target: torch.dtype | str) -> "Operands":
        return Operands(*(None if tensor is None else tensor.to(target) for tensor in self))


def operands(
    steps: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    last_cell: bool = True,
    seed: int = 0,
) -> Operands:
    """Numbers of a trained layer's size."""
    generator = torch.Generator().manual_seed(steps + batch + hidden + seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    wide, width = 4 * hidden, hidden**-0.5
    state, both = (batch, hidden), (wide, hidden)
    return Operands(
        normal(steps, batch, wide), normal(*state), normal(*state), normal(*both, scale=width),
        normal(*both, scale=width), normal(batch, wide), normal(batch, wide) if bias else None,
        normal(steps, *state), normal(*state) if last_cell else None,
    )  # fmt: skip


def plain(given: Operands, dtype: torch.dtype, reverse: bool) -> dict[str, Tensor]:
    """Everything that forward and backward compute, by autograd, in this dtype."""
    share, h, c, weight, response_weight, scale, shift, dy, d_last_cell = given.to(dtype)
    leaves = share, h_0, c_0 = [tensor.clone().requires_grad_() for tensor in (share, h, c)]
    h, c, steps = h_0, c_0, []
    for x in share.unbind(0)[:: -1 if reverse else 1]:
        q = h @ response_weight.T
        before = x + h @ weight.T + scale * q + (0 if shift is None else shift)
        i, f, g, o = before.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        steps.append((h, torch.cat([i, f, g, o], -1), c, q))
    y, gates, cells, response = (torch.stack(one[:: -1 if reverse else 1]) for one in zip(*steps, strict=True))
    loss = (y * dy).sum() + (0 if d_last_cell is None else (c * d_last_cell).sum())
    gradients = dict(zip(DIFFERENTIATED, torch.autograd.grad(loss, leaves), strict=True))
    return {"y": y, "c_n": c, "gates": gates, "cells": cells, "response": response} | gradients


def ran(way: Any, given: Operands, reverse: bool = False) -> dict[str, Tensor]:
    """Everything that a module's or a way's `forward` keeps, and its `backward` computes from that."""
    share, h_0, c_0, weight, response_weight, scale, shift, dy, d_last_cell = given
    gates = share.clone()
    y, c_n, cells, response = way.forward(gates, h_0, c_0, weight, response_weight, scale, shift, reverse, True, True)
    gradients = way.backward(dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, reverse, True)
    kept = {"y": y, "c_n": c_n, "gates": gates, "cells": cells, "response": response}
    return kept | dict(zip(DIFFERENTIATED, gradients, strict=True))


def assert_right(got: dict[str, Tensor], given: Operands, reverse: bool = False) -> None:
    """The 2x rule for everything in `got`."""
    rounded, exact = (plain(given, dtype, reverse) for dtype in (given.share.dtype, torch.float64))
    for name, tensor in got.items():
        assert_twice_as_good(tensor, rounded[name], exact[name], name)


def layer(
    steps: int, batch: int, inputs: int, hidden: int, n: int, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """x, h_0, c_0, both sides' weights and h, and the gradients of y and c_n, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    wide, state = 4 * hidden, (batch, hidden)
    shapes: list[tuple[int, ...]] = [(steps, batch, inputs), state, state]
    for width in (inputs, hidden):
        shapes += [(wide, width), (wide,), (wide, width), (wide,), (wide, n), (wide, n)]
    shapes += [(batch, n), (steps, *state), state]
    scales = [1.0 if len(shape) == 1 or shape[0] != wide else shape[1] ** -0.5 for shape in shapes]
    drawn = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
    *leaves, dy, d_last_cell = (tensor.to(device, torch.bfloat16) for tensor in drawn)
    return leaves, [dy, d_last_cell]


def differentiated(
    function: Callable[..., tuple[Tensor, tuple[Tensor, Tensor]]],
    leaves: list[Tensor],
    incoming: list[Tensor] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """y, c_n and the gradients of all leaves; without any incoming, of the sum, whose own is one number expanded."""
    x, h_0, c_0, *weights, h = inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    y, (_, c_n) = function(x, h_0, c_0, GatedParameters(*weights[:6]), GatedParameters(*weights[6:]), h)
    if incoming is None:
        return [y, c_n, *torch.autograd.grad(y.sum() + c_n.sum(), inputs)]
    given = [gradient.to(dtype) for gradient in incoming]
    return [y, c_n, *torch.autograd.grad((y, c_n), inputs, given)]
