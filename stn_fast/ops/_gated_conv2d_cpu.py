"""gated_conv2d on the CPU in float32: library convolutions by blocks of examples, around the C++ core's epilogues.

A block's P and Q, or their gradients, are used while they are in the cache, and their memory serves the next block.
Where it pays, the library is given its images pixel by pixel (channels_last) whatever the caller's layout: it would
convert them itself, at greater cost than the core's epilogues, which read one layout and write the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stn_fast.ops import _gated_conv2d_driver as driver
from stn_fast.ops._core import address
from stn_fast.ops._gated_conv2d_driver import Geometry, Gradients, Wanted

_BLOCK = 1 << 20  # numbers: P and Q of a block are 4 MiB
_LAST_PIXELS = 64  # pixels of a result from which the library is faster pixel by pixel
_LEAST_1X1 = 16  # examples below which torch computes a 1x1 convolution on one thread with slow code


class Plan(NamedTuple):
    """Layouts (channels_last or contiguous) and blocks of one call."""

    outer: torch.memory_format  # the caller's
    inner: torch.memory_format  # the library's
    step: int  # examples of a block
    output: tuple[int, int, int, int]  # (B, O, Ho, Wo)

    def blocks(self) -> Iterator[slice]:
        batch = self.output[0]
        for first in range(0, batch, self.step):
            yield slice(first, min(first + self.step, batch))

    def sizes(self, block: slice, groups: int) -> tuple[int, int, int, int]:
        """What the core counts: examples, groups, channels of a group, pixels."""
        _, outputs, height, width = self.output
        return block.stop - block.start, groups, outputs // groups, height * width

    @property
    def lasts(self) -> tuple[bool, bool]:
        return self.inner == torch.channels_last, self.outer == torch.channels_last

    @property
    def converts(self) -> bool:
        return self.inner != self.outer


def plan(x: Tensor, weight: Tensor, geometry: Geometry) -> Plan:
    batch, outputs, kernel = x.shape[0], weight.shape[0], weight.shape[2:]
    height, width = driver.output_pixels(x, weight, geometry)
    outer = inner = driver.memory_format(x, weight)
    if geometry.groups == 1 and height * width >= _LAST_PIXELS:
        inner = torch.channels_last
    # A block holds at least twice what the filters do, so that adding up their gradients costs little.
    numbers = max(_BLOCK, 4 * weight.numel())
    step = max(1, numbers // (2 * outputs * height * width), _LEAST_1X1 if tuple(kernel) == (1, 1) else 1)
    blocks = -(-batch // step)
    return Plan(outer, inner, -(-batch // blocks), (batch, outputs, height, width))


def forward(
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
) -> tuple[Tensor, Tensor | None]:
    from stn_fast._C import channel_epilogue_forward

    stride, padding, dilation, groups, relu = geometry
    layout = plan(x, weight, geometry)
    filters = _joined(weight, response_weight, groups, layout.inner)
    scale, shift = driver.gates(bias, response_bias, weight_gate, bias_gate, h)
    y = torch.empty(layout.output, memory_format=layout.outer)
    q = torch.empty(layout.output, memory_format=layout.inner) if save_response else None
    for block in layout.blocks():
        both = torch.conv2d(_image(x, block, layout), filters, None, stride, padding, dilation, groups)
        both = both.contiguous(memory_format=layout.inner)
        channel_epilogue_forward(
            address(both), address(scale[block]), address(_part(shift, block)), address(y[block]),
            address(_part(q, block)), *layout.sizes(block, groups), *layout.lasts, relu,
            torch.get_num_threads(),
        )  # fmt: skip
    return y, None if q is None else q.unflatten(1, (groups, -1))


def backward(
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
    from stn_fast._C import channel_epilogue_backward

    groups, layout = geometry.groups, plan(x, weight, geometry)
    scale, _ = driver.gates(None, None, weight_gate, None, h)
    d_scale = torch.empty_like(scale) if wanted.scale else None
    d_shift = torch.empty_like(scale) if wanted.shift(response_bias) else None
    products = q.flatten(1, 2).contiguous(memory_format=layout.inner) if wanted.scale else None
    filters = _joined(weight, response_weight, groups, layout.inner)
    d_both_memory = None
    if wanted.x or wanted.filters:
        _, outputs, *pixels = layout.output
        d_both_memory = torch.empty(layout.step, 2 * outputs, *pixels, memory_format=layout.inner)
    dx = torch.empty_like(x) if wanted.x else None
    d_filters = None
    for block in layout.blocks():
        d_both = None if d_both_memory is None else d_both_memory[: block.stop - block.start]
        channel_epilogue_backward(
            address(dy[block]), address(_part(y, block)), address(_part(products, block)), address(scale[block]),
            address(d_both), address(_part(d_scale, block)), address(_part(d_shift, block)),
            *layout.sizes(block, groups), *layout.lasts, torch.get_num_threads(),
        )  # fmt: skip
        if d_both is None:
            continue
        # The data gradient asks only for the image's shape and layout.
        image = _image(x, block, layout) if wanted.filters else torch.empty(x[block].shape, memory_format=layout.inner)
        of_dx, of_filters = driver.joined_gradients(d_both, image, weight, filters, geometry, wanted)
        if dx is not None and of_dx is not None:
            _put(of_dx, dx[block], layout)
        if of_filters is not None:
            d_filters = of_filters if d_filters is None else d_filters.add_(of_filters)
    gates = driver.gate_gradients(d_scale, d_shift, response_bias, weight_gate, bias_gate, h, wanted)
    return Gradients(dx, d_filters, *gates)


def _joined(weight: Tensor, response_weight: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """The filters [W; R] in the library's layout.

    Strides are spelled out by torch.empty: contiguous() leaves those of filters over one channel ambiguous.
    """
    from stn_fast._C import transpose

    outputs, inputs, *kernel = weight.shape
    joined = torch.empty(2 * outputs, inputs, *kernel, memory_format=layout)
    halves = joined.unflatten(0, (groups, 2, -1))
    for half, filters in enumerate((weight, response_weight)):
        if groups == 1 and layout == torch.channels_last and filters.is_contiguous():
            to = halves[0, half].data_ptr()
            transpose(filters.data_ptr(), to, outputs, inputs, math.prod(kernel), torch.get_num_threads())
        else:
            halves[:, half].copy_(filters.unflatten(0, (groups, -1)))
    return joined


def _part(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]


def _image(x: Tensor, block: slice, layout: Plan) -> Tensor:
    """A block of x in the library's layout."""
    from stn_fast import _C

    part = x[block]
    if not layout.converts:
        return part
    image = torch.empty(part.shape, memory_format=layout.inner)
    batch, channels, height, width = part.shape
    _C.transpose(part.data_ptr(), image.data_ptr(), batch, channels, height * width, torch.get_num_threads())
    return image


def _put(part: Tensor, to: Tensor, layout: Plan) -> None:
    """Writes a block's result, in the library's layout, into the caller's."""
    from stn_fast import _C

    if not layout.converts:
        to.copy_(part)
        return
    part = part.contiguous(memory_format=layout.inner)
    batch, channels, height, width = part.shape
    _C.transpose(part.data_ptr(), to.data_ptr(), batch, height * width, channels, torch.get_num_threads())
