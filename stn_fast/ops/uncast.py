"""Matrix products in the dtype of their operands, even under autocast, forward and backward.

torch computes its own norms in float32 under autocast. Functions that use matrix products and need the same accuracy
call these; autocast may be on around a forward pass, a backward pass, or both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stn_fast.ops.memory import autocasts
from stn_fast.ops.transforms import traced


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b for matrices, or for stacks of equally many matrices; differentiable in every mode."""
    if traced(a, b) or not torch.is_grad_enabled() or not (a.requires_grad or b.requires_grad):
        return _product(a, b)  # a compiled backward pass is traced without autocast
    return _Product.apply(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if not autocasts(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _Product(torch.autograd.Function):
    """The gradients are computed by `product` again, so that they are differentiable and not cast either."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _product(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (dy,), (a, b) = gradients, ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return product(dy, b.mT) if of_a else None, product(a.mT, dy) if of_b else None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (da, db), (a, b) = tangents, ctx.saved_tensors
        parts = [product(da, b)] if da is not None else []
        parts += [product(a, db)] if db is not None else []
        return sum(parts[1:], parts[0])
