"""gated_conv2d in plain torch, forward and backward, for what no kernel computes; 16-bit numbers are rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stn_fast.ops.gated_conv2d import joined
from stn_fast.ops.gated_conv2d.joined import Result, memory_format


class Epilogues:
    """As `joined.Epilogues` describes them."""

    @staticmethod
    def choose_forward(*problem: Any, library: Callable[[], Result]) -> Result:
        return library()

    @staticmethod
    def epilogue_forward(
        both: Tensor, scale: Tensor, shift: Tensor | None, groups: int, relu: bool, q: Tensor | None = None
    ) -> Tensor:
        if q is None:
            p, q = both.unflatten(1, (groups, 2, -1)).unbind(2)
        else:
            p, q = (branch.unflatten(1, (groups, -1)) for branch in (both, q))
        y = torch.addcmul(p.to(scale.dtype), _channels(scale, groups), q)
        if shift is not None:
            y += _channels(shift, groups)
        if relu:
            y.relu_()
        return y.flatten(1, 2).to(both.dtype).contiguous(memory_format=memory_format(both, both))

    @staticmethod
    def epilogue_partials(
        dy: Tensor,
        y: Tensor | None,
        q: Tensor,
        scale: Tensor,
        groups: int,
        relu: bool,
        wants_both: bool,
        wants_scale: bool,
        wants_shift: bool,
        apart: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if relu and y is not None:
            dy = torch.where(y <= 0, 0, dy)  # as torch's rule: where y is NaN the gradient passes
        wide = dy.to(scale.dtype)
        d_both = None
        if wants_both:
            g = (wide * scale[:, :, None, None]).to(dy.dtype)
            if apart:
                d_both = torch.cat([dy, g])
            else:
                halves = [half.unflatten(1, (groups, -1)) for half in (dy, g)]
                d_both = torch.stack(halves, dim=2).flatten(1, 3)
            d_both = d_both.contiguous(memory_format=memory_format(dy, dy))
        d_scale = (wide.unflatten(1, (groups, -1)) * q).sum((-2, -1)).flatten(1)[None] if wants_scale else None
        return d_both, d_scale, wide.sum((-2, -1))[None] if wants_shift else None


def _channels(per_channel: Tensor, groups: int) -> Tensor:
    """(B, O) → (B, groups, O/groups, 1, 1)"""
    return per_channel.unflatten(1, (groups, -1))[..., None, None]


forward = partial(joined.forward, Epilogues(), None)
backward = partial(joined.backward, Epilogues(), None)
