"""gated_conv2d around library convolutions: in plain torch for any dtype and device, and with fused epilogues.

Both branches are one convolution with the filters [W; R], so that x is read once; what surrounds it is an epilogue.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from stn_fast.ops._gated_linear_plain import Gradients, Wanted
from stn_fast.ops.memory import as_one

Result: TypeAlias = tuple[Tensor, Tensor | None]


class Geometry(NamedTuple):
    """How the filters move over an image, and whether ReLU follows."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    relu: bool


class Kernels(Protocol):
    """What surrounds the convolution, with P and Q the channels of conv(x, W) and conv(x, R)."""

    @property
    def MAX_N(self) -> int:
        """Most hyperparameters that `gates` and `gates_backward` take."""

    @property
    def gates(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """As `gates` of this module."""

    @property
    def gates_backward(self) -> Callable[..., tuple[Tensor | None, ...]]:
        """(db, dr, dGw, dGb, dh), those at least that are wanted, of d_scale, d_shift, r, Gw, Gb, h and `Wanted`; the
        first two as `epilogue_partials` has them."""

    def choose_forward(self, *problem: Any, library: Callable[[], Result]) -> Result:
        """(y, q) of `library`, one library convolution and `epilogue_forward`, or of something faster.

        The problem is x, W, R, scale, shift, stride, padding, dilation, groups, relu and whether q is to be saved.
        """

    def epilogue_forward(self, both: Tensor, scale: Tensor, shift: Tensor | None, groups: int, relu: bool) -> Tensor:
        """y = P + scale ⊙ Q + shift, then ReLU where asked; `both` (B, 2·O, Ho, Wo), scale and shift (B, O)."""

    def epilogue_partials(
        self,
        dy: Tensor,
        y: Tensor | None,
        q: Tensor,
        scale: Tensor,
        groups: int,
        relu: bool,
        wants_both: bool,
        wants_scale: bool,
        wants_shift: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_both, d_scale, d_shift), the last two in parts to be added up, (parts, B, O).

        q is the view of `both` that `response_half` gives.
        """


def join(weight: Tensor, response_weight: Tensor, groups: int) -> Tensor:
    """[W; R], and for groups the filters of each group so: (2·O, I/groups, kh, kw).

    Those of one group that are stored so, as a HyperConv2d stores them, are not copied.
    """
    if groups == 1:
        stored = as_one(weight, response_weight)
        return torch.cat([weight, response_weight]) if stored is None else stored
    halves = [w.unflatten(0, (groups, -1)) for w in (weight, response_weight)]
    return torch.cat(halves, dim=1).flatten(0, 1)


def split(filters: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(W, R) of `join`: views of one group's filters, else in memory of their own."""
    if groups == 1:
        weight, response_weight = filters.chunk(2)
        return weight, response_weight
    weight, response_weight = filters.unflatten(0, (groups, 2, -1)).unbind(1)
    return weight.clone().flatten(0, 1), response_weight.clone().flatten(0, 1)


def response_half(both: Tensor, groups: int) -> Tensor:
    """Q as a view (B, groups, O/groups, Ho, Wo) of P and Q (B, 2·O, Ho, Wo), whose channels lie as `join` puts them."""
    return both.unflatten(1, (groups, 2, -1))[:, :, 1]


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where x or the filters lie so, as torch's own convolutions decide: one channel by its stride."""
    for tensor in (x, weight):
        several_pixels = tensor.shape[2] * tensor.shape[3] > 1
        if several_pixels and tensor.stride(1) == 1 and tensor.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def output_pixels(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    """(Ho, Wo)"""
    height, width = (
        (x.shape[2 + d] + 2 * geometry.padding[d] - geometry.dilation[d] * (weight.shape[2 + d] - 1) - 1)
        // geometry.stride[d]
        + 1
        for d in (0, 1)
    )
    return height, width


class Plain:
    """In plain torch; 16-bit numbers are computed in float32 and rounded once."""

    MAX_N = sys.maxsize

    @staticmethod
    def gates(*operands: Any) -> tuple[Tensor, Tensor | None]:
        return gates(*operands)

    @staticmethod
    def gates_backward(d_scale: Tensor | None, d_shift: Tensor | None, *operands: Any) -> tuple[Tensor | None, ...]:
        d_scale, d_shift = (None if parts is None else parts.sum(0) for parts in (d_scale, d_shift))
        found = with_gates(None, (None, None), d_scale, d_shift, *operands)
        return found.bias, found.response_bias, found.weight_gate, found.bias_gate, found.h

    @staticmethod
    def choose_forward(*problem: Any, library: Callable[[], Result]) -> Result:
        return library()

    @staticmethod
    def epilogue_forward(both: Tensor, scale: Tensor, shift: Tensor | None, groups: int, relu: bool) -> Tensor:
        p, q = both.unflatten(1, (groups, 2, -1)).unbind(2)
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
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if relu and y is not None:
            dy = torch.where(y <= 0, 0, dy)  # as torch's rule: where y is NaN the gradient passes
        wide = dy.to(scale.dtype)
        d_both = None
        if wants_both:
            g = (wide * scale[:, :, None, None]).to(dy.dtype)
            halves = [half.unflatten(1, (groups, -1)) for half in (dy, g)]
            d_both = torch.stack(halves, dim=2).flatten(1, 3).contiguous(memory_format=memory_format(dy, dy))
        d_scale = (wide.unflatten(1, (groups, -1)) * q).sum((-2, -1)).flatten(1)[None] if wants_scale else None
        return d_both, d_scale, wide.sum((-2, -1))[None] if wants_shift else None


def _channels(per_channel: Tensor, groups: int) -> Tensor:
    """(B, O) → (B, groups, O/groups, 1, 1)"""
    return per_channel.unflatten(1, (groups, -1))[..., None, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gates(
    bias: Tensor | None, response_bias: Tensor | None, weight_gate: Tensor, bias_gate: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Every example's scale h Gwᵀ and shift b + (h Gbᵀ) ⊙ r, (B, O), in float32 or wider."""
    dtype = _wide(h.dtype)
    wide_h = h.to(dtype)
    scale = wide_h @ weight_gate.to(dtype).T
    if bias is None or response_bias is None or bias_gate is None:
        return scale, None
    return scale, torch.addcmul(bias.to(dtype), wide_h @ bias_gate.to(dtype).T, response_bias.to(dtype))


def forward(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    *,
    geometry: Geometry,
    save_response: bool,
    choose: bool,
) -> Result:
    """(y, q), q None where nobody will ask; unless the kernels may `choose`, q is as `response_half` gives it."""
    stride, padding, dilation, groups, relu = geometry
    layout = memory_format(x, weight)
    scale, shift = _of_gates(kernels, h).gates(bias, response_bias, weight_gate, bias_gate, h)

    def library() -> Result:
        both = torch.conv2d(x, join(weight, response_weight, groups), None, stride, padding, dilation, groups)
        both = both.contiguous(memory_format=layout)
        y = kernels.epilogue_forward(both, scale, shift, groups, relu)
        return y, response_half(both, groups) if save_response else None

    if not choose:
        return library()
    problem = (x, weight, response_weight, scale, shift, stride, padding, dilation, groups, relu, save_response)
    return kernels.choose_forward(*problem, library=library)


def backward(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    q: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> Gradients:
    """One pass over dy and q, then a data and a weight gradient of the joined convolution, each where wanted."""
    groups, relu = geometry.groups, geometry.relu
    wants_both = wanted.x or wanted.weight or wanted.response_weight
    wants_scale, wants_shift = wanted_sums(response_bias, wanted)
    of_gates = _of_gates(kernels, h)
    scale, _ = of_gates.gates(None, None, weight_gate, None, h)
    d_both, d_scale, d_shift = kernels.epilogue_partials(
        dy, y, q, scale, groups, relu, wants_both, wants_scale, wants_shift
    )
    dx: Tensor | None = None
    d_filters: tuple[Tensor | None, Tensor | None] = (None, None)
    if d_both is not None:
        filters = join(weight, response_weight, groups)
        dx, d_filters = joined_gradients(d_both, x, filters, geometry, wanted)
    d_bias, d_response_bias, d_weight_gate, d_bias_gate, dh = of_gates.gates_backward(
        d_scale, d_shift, response_bias, weight_gate, bias_gate, h, wanted
    )
    return Gradients(
        x=dx,
        weight=d_filters[0],
        bias=d_bias if wanted.bias else None,
        response_weight=d_filters[1],
        response_bias=d_response_bias if wanted.response_bias else None,
        weight_gate=d_weight_gate if wanted.weight_gate else None,
        bias_gate=d_bias_gate if wanted.bias_gate else None,
        h=dh,
    )


def _of_gates(kernels: Kernels, h: Tensor) -> Kernels:
    """What computes gates: the kernels, or plain torch where they have no registers for so many hyperparameters."""
    return kernels if h.shape[1] <= kernels.MAX_N else Plain()


def wanted_sums(response_bias: Tensor | None, wanted: Wanted) -> tuple[bool, bool]:
    """Whether the gradients of h Gwᵀ and of b + (h Gbᵀ) ⊙ r are needed."""
    any_shift = wanted.bias or wanted.response_bias or wanted.bias_gate or wanted.h
    return wanted.weight_gate or wanted.h, response_bias is not None and any_shift


def joined_gradients(
    d_both: Tensor, x: Tensor, filters: Tensor, geometry: Geometry, wanted: Wanted
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """dx and (dW, dR) of the convolution with the joined filters, where wanted."""
    groups = geometry.groups
    if wanted.weight == wanted.response_weight:
        dx, d_filters = convolution_gradients(d_both, x, filters, geometry, wanted.x, wanted.weight)
        return dx, (None, None) if d_filters is None else split(d_filters, groups)
    dx, _ = convolution_gradients(d_both, x, filters, geometry, wanted.x, False)
    half = 0 if wanted.weight else 1
    of_filters = split(filters, groups)[half]
    of_both = d_both.unflatten(1, (groups, 2, -1))[:, :, half].flatten(1, 2)
    of_both = of_both.contiguous(memory_format=memory_format(x, filters))
    _, d_filters = convolution_gradients(of_both, x, of_filters, geometry, False, True)
    return dx, (d_filters, None) if wanted.weight else (None, d_filters)


def convolution_gradients(
    dy: Tensor, x: Tensor, filters: Tensor, geometry: Geometry, wants_x: bool, wants_filters: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The library's data and weight gradient of one convolution."""
    stride, padding, dilation, groups, _ = geometry
    if not (wants_x or wants_filters):
        return None, None
    dx, d_filters, _ = torch.ops.aten.convolution_backward(
        dy, x, filters, None, stride, padding, dilation, False, [0, 0], groups, [wants_x, wants_filters, False]
    )
    return dx, d_filters


def with_gates(
    dx: Tensor | None,
    d_filters: Sequence[Tensor | None],
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    wanted: Wanted,
) -> Gradients:
    """All gradients: those of bias, response_bias, the gates and h follow from those of scale and shift (B, O)."""
    dtype = _wide(h.dtype)
    wide_h = h.to(dtype)
    d_bias = d_response_bias = d_weight_gate = d_bias_gate = dh = None
    if d_scale is not None:
        d_weight_gate = d_scale.T @ wide_h if wanted.weight_gate else None
        dh = d_scale @ weight_gate.to(dtype) if wanted.h else None
    if d_shift is not None and response_bias is not None and bias_gate is not None:
        d_bias = d_shift.sum(0) if wanted.bias else None
        if wanted.response_bias:
            d_response_bias = (d_shift * (wide_h @ bias_gate.to(dtype).T)).sum(0)
        if wanted.bias_gate or dh is not None:
            d_gated = d_shift * response_bias.to(dtype)
            d_bias_gate = d_gated.T @ wide_h if wanted.bias_gate else None
            dh = dh.addmm_(d_gated, bias_gate.to(dtype)) if dh is not None else None

    def narrow(gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient.to(h.dtype)

    return Gradients(
        x=dx,
        weight=d_filters[0],
        bias=narrow(d_bias),
        response_weight=d_filters[1],
        response_bias=narrow(d_response_bias),
        weight_gate=narrow(d_weight_gate),
        bias_gate=narrow(d_bias_gate),
        h=narrow(dh),
    )
