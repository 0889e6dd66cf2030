"""gated_conv2d around one library convolution, in plain torch for any dtype and device, and with fused epilogues.

Both branches are one convolution with the filters [W; R], so that x is read once; what surrounds it is an epilogue.
A response of low rank is two small convolutions of its own, u = conv(x, B) and Q = conv(u, A).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, GateGradients, Gradients, Wanted, gate_gradients, gates, gradients
from stn_fast.ops.memory import as_one

Result: TypeAlias = tuple[Tensor, Tensor | None]


class Geometry(NamedTuple):
    """How the filters move over an image, and whether ReLU follows."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    relu: bool


class GateKernels(Protocol):
    """What computes the gates of up to MAX_N hyperparameters, and their gradients; for more, plain torch does."""

    @property
    def MAX_N(self) -> int: ...

    @property
    def gates(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """(scale, shift), as `stn_fast.ops.gates.gates`, of b, r, Gw, Gb and h."""

    @property
    def gates_backward(self) -> Callable[..., tuple[Tensor | None, ...]]:
        """(db, dr, dGw, dGb, dh), those at least that are wanted, of d_scale, d_shift, r, Gw, Gb, h and `Wanted`; the
        first two as `epilogue_partials` has them."""


class Epilogues(Protocol):
    """What surrounds the convolution, with P and Q the channels of conv(x, W) and conv(x, R)."""

    @property
    def choose_forward(self) -> Callable[..., Result]:
        """(y, q) of `library`, one library convolution and `epilogue_forward`, or of something faster.

        Called with x, W, R, scale, shift, stride, padding, dilation, groups, relu, whether q is kept, and `library`.
        """

    def epilogue_forward(
        self, both: Tensor, scale: Tensor, shift: Tensor | None, groups: int, relu: bool, q: Tensor | None = None
    ) -> Tensor:
        """y = P + scale ⊙ Q + shift, then ReLU where asked; `both` (B, 2·O, Ho, Wo), scale and shift (B, O).

        With q (B, O, Ho, Wo), `both` is P alone.
        """

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
        apart: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_both, d_scale, d_shift), the last two in parts to be added up, (parts, B, O).

        d_both is (B, 2·O, Ho, Wo) as `both`, or where P and Q are `apart` (2·B, O, Ho, Wo): dP, then dQ.

        q is the view of `both` that `response_half` gives.
        """


def pointwise(geometry: Geometry) -> Geometry:
    """How A (O, k, 1, 1) moves over u."""
    return Geometry([1, 1], [0, 0], [1, 1], geometry.groups, False)


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


def forward(
    epilogues: Epilogues,
    gate_kernels: GateKernels | None,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    geometry: Geometry,
    save_response: bool,
    choose: bool,
) -> Result:
    """(y, q), q None where nobody will ask; unless the epilogues may `choose`, q is as `response_half` gives it.

    Of a response of low rank, u is in the place of q.
    """
    stride, padding, dilation, groups, relu = geometry
    weight, response_weight, projection = parameters.weight, parameters.response_weight, parameters.response_projection
    layout = memory_format(x, weight)
    scale, shift = _gates(gate_kernels, parameters, h)
    if projection is not None:
        p, u = (
            torch.conv2d(x, filters, None, stride, padding, dilation, groups).contiguous(memory_format=layout)
            for filters in (weight, projection)
        )
        q = torch.conv2d(u, response_weight, groups=groups)
        return epilogues.epilogue_forward(p, scale, shift, groups, relu, q), u if save_response else None

    def library() -> Result:
        both = torch.conv2d(x, join(weight, response_weight, groups), None, stride, padding, dilation, groups)
        both = both.contiguous(memory_format=layout)
        y = epilogues.epilogue_forward(both, scale, shift, groups, relu)
        return y, response_half(both, groups) if save_response else None

    if not choose:
        return library()
    problem = (x, weight, response_weight, scale, shift, stride, padding, dilation, groups, relu, save_response)
    return epilogues.choose_forward(*problem, library=library)


def backward(
    epilogues: Epilogues,
    gate_kernels: GateKernels | None,
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    y: Tensor | None,
    q: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> Gradients:
    """One pass over dy and q, then a data and a weight gradient of the joined convolution, each where wanted."""
    groups, relu, projection = geometry.groups, geometry.relu, parameters.response_projection
    wants_both = wanted.x or wanted.weight or wanted.response_weight or wanted.response_projection
    u = q
    if projection is not None and wanted.scale:
        q = torch.conv2d(u, parameters.response_weight, groups=groups)
        q = q.contiguous(memory_format=memory_format(x, parameters.weight)).unflatten(1, (groups, -1))
    wants_shift = wanted.shift and parameters.response_bias is not None
    scale, _ = _gates(gate_kernels, without_biases(parameters), h)
    d_both, d_scale, d_shift = epilogues.epilogue_partials(
        dy, y, q, scale, groups, relu, wants_both, wanted.scale, wants_shift, projection is not None
    )
    dx = d_weight = d_response_weight = d_projection = None
    if d_both is not None and projection is not None:
        d_p, d_q = d_both.chunk(2)
        dx, d_weight = convolution_gradients(d_p, x, parameters.weight, geometry, wanted.x, wanted.weight)
        of_x, d_response_weight, d_projection = response_gradients(d_q, x, u, parameters, geometry, wanted)
        dx = dx + of_x if dx is not None and of_x is not None else None
    elif d_both is not None:
        filters = join(parameters.weight, parameters.response_weight, groups)
        dx, (d_weight, d_response_weight) = joined_gradients(d_both, x, filters, geometry, wanted)
    of_gates = _gate_gradients(gate_kernels, d_scale, d_shift, parameters, h, wanted)
    return gradients(
        of_gates, x=dx, weight=d_weight, response_weight=d_response_weight, response_projection=d_projection
    )


def response_gradients(
    d_q: Tensor, x: Tensor, u: Tensor, parameters: GatedParameters, geometry: Geometry, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dA, dB) of conv(conv(x, B), A), where wanted."""
    projection = parameters.response_projection
    assert projection is not None
    needs_u = wanted.x or wanted.response_projection
    if wanted.response_weight or needs_u:
        # The data gradient asks for the shape and the layout of its images alone, and u may not have been kept.
        images = u if u.numel() else d_q.new_empty(len(d_q), len(projection), *d_q.shape[2:])
        du, d_factor = convolution_gradients(
            d_q, images, parameters.response_weight, pointwise(geometry), needs_u, wanted.response_weight
        )
        if du is not None:
            dx, d_projection = convolution_gradients(du, x, projection, geometry, wanted.x, wanted.response_projection)
            return dx, d_factor, d_projection
        return None, d_factor, None
    return None, None, None


def without_biases(parameters: GatedParameters) -> GatedParameters:
    """Enough for the scale alone."""
    return parameters._replace(bias=None, response_bias=None, bias_gate=None)


def _gates(kernels: GateKernels | None, parameters: GatedParameters, h: Tensor) -> tuple[Tensor, Tensor | None]:
    if kernels is None or h.shape[1] > kernels.MAX_N:
        return gates(parameters, h)
    _, bias, _, response_bias, weight_gate, bias_gate, _ = parameters
    return kernels.gates(bias, response_bias, weight_gate, bias_gate, h)


def _gate_gradients(
    kernels: GateKernels | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    parameters: GatedParameters,
    h: Tensor,
    wanted: Wanted,
) -> GateGradients:
    if kernels is None or h.shape[1] > kernels.MAX_N:
        d_scale, d_shift = (None if parts is None else parts.sum(0) for parts in (d_scale, d_shift))
        return gate_gradients(d_scale, d_shift, parameters, h, wanted)
    *_, response_bias, weight_gate, bias_gate, _ = parameters
    found = kernels.gates_backward(d_scale, d_shift, response_bias, weight_gate, bias_gate, h, wanted)
    # Kernels compute some of these together.
    wants = (wanted.bias, wanted.response_bias, wanted.weight_gate, wanted.bias_gate, wanted.h)
    return GateGradients(*(gradient if w else None for gradient, w in zip(found, wants, strict=True)))


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
