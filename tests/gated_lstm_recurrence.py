"""The recurrence of a gated LSTM in plain torch, for any dtype, and operands for it."""

from typing import NamedTuple

import torch
from numerics import assert_twice_as_good
from torch import Tensor

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


def operands(steps: int, batch: int, hidden: int, bias: bool = True, last_cell: bool = True) -> Operands:
    """Numbers of a trained layer's size, in bfloat16."""
    generator = torch.Generator().manual_seed(steps + batch + hidden)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(torch.bfloat16)

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


def assert_right(got: dict[str, Tensor], given: Operands, reverse: bool) -> None:
    """The 2x rule for everything in `got`."""
    rounded, exact = (plain(given, dtype, reverse) for dtype in (torch.bfloat16, torch.float64))
    for name, tensor in got.items():
        assert_twice_as_good(tensor, rounded[name], exact[name], name)
