"""gated_conv2d on the CPU in float32: library convolutions around the C++ core's epilogues.

Two ways, by the size of P and Q, which lie between the convolutions and the epilogue:

- Large ones are made by blocks of examples, each one convolution with the filters [W; R]. A block's P and Q, or their
  gradients, are used while they are in the cache, and their memory serves the next block: fresh pages cost more than
  the arithmetic on them.
- Small ones, or those of filters still larger, come from two convolutions, which take the filters as they are, and
  the epilogue overwrites P with y.

Of a response of low rank P and Q come from convolutions of their own either way.

The library is given large images pixel by pixel (channels_last) whatever the caller's layout is: it would convert
them itself, at greater cost than the epilogues, which read one layout and write the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from stn_fast.ops.gated_conv2d import joined
from stn_fast.ops.gated_conv2d.joined import Geometry, without_biases
from stn_fast.ops.gates import GatedParameters, Gradients, Wanted, gate_gradients, gates, gradients
from stn_fast.ops.memory import address, as_one

_AT_ONCE = 1 << 22  # numbers: P and Q are 16 MiB
_BLOCK = 1 << 20
_LAST_PIXELS = 256  # pixels of an image from which the library is faster pixel by pixel
_LEAST_1X1 = 16  # examples below which torch computes a 1x1 convolution on one thread with slow code


def _empty(shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """Memory for the core to write: float32 on the CPU, whatever torch.set_default_dtype and _device say."""
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)


@cache
def _keep_freed_memory() -> None:
    """Makes glibc keep the memory of a block for the next one, instead of giving it back and asking for fresh pages.

    It learns by itself what a program frees, up to 32 MiB, and keeps twice as much: told once, by a tensor that is
    never touched and so takes no memory, it doesn't depend on what ran before. Other allocators don't mind.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class Plan(NamedTuple):
    """Layouts (channels_last or contiguous) and blocks of one call."""

    outer: torch.memory_format  # the caller's
    inner: torch.memory_format  # the library's
    step: int  # examples of a block
    output: tuple[int, int, int, int]  # (B, O, Ho, Wo)
    low_rank: bool

    @property
    def by_blocks(self) -> bool:
        return self.step < self.output[0]

    @property
    def joined(self) -> bool:
        """Whether both branches are one convolution."""
        return self.by_blocks and not self.low_rank

    @property
    def converts(self) -> bool:
        return self.inner != self.outer

    def blocks(self) -> Iterator[slice]:
        batch = self.output[0]
        for first in range(0, batch, self.step):
            yield slice(first, min(first + self.step, batch))

    def core(self, block: slice, groups: int) -> tuple[int, int, int, int, bool, bool, bool]:
        """What the core is told: examples, groups, channels of a group, pixels; joined, and who has channels last."""
        _, outputs, height, width = self.output
        lasts = (self.inner == torch.channels_last, self.outer == torch.channels_last)
        return block.stop - block.start, groups, outputs // groups, height * width, self.joined, *lasts


def plan(x: Tensor, weight: Tensor, geometry: Geometry, low_rank: bool = False) -> Plan:
    batch, outputs, kernel = x.shape[0], weight.shape[0], weight.shape[2:]
    height, width = joined.output_pixels(x, weight, geometry)
    outer = inner = joined.memory_format(x, weight)
    if geometry.groups == 1 and x.shape[2] * x.shape[3] >= _LAST_PIXELS:
        inner = torch.channels_last
    of_example, of_filters = 2 * outputs * height * width, 2 * weight.numel()
    step = batch
    if batch * of_example > max(_AT_ONCE, 2 * of_filters):
        # A block holds at least twice what the filters do, so that adding up their gradients costs little.
        most = max(_BLOCK, 2 * of_filters) // of_example
        most = max(most, _LEAST_1X1 if tuple(kernel) == (1, 1) else 1)
        step = -(-batch // -(-batch // most))
    return Plan(outer, inner, step, (batch, outputs, height, width), low_rank)


def forward(
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    geometry: Geometry,
    save_response: bool,
    choose: bool,
) -> tuple[Tensor, Tensor | None]:
    from stn_fast._C import channel_epilogue_forward

    groups, relu = geometry.groups, geometry.relu
    weight, response_weight, projection = parameters.weight, parameters.response_weight, parameters.response_projection
    layout = plan(x, weight, geometry, projection is not None)
    scale, shift = gates(parameters, h)

    def convolve(image: Tensor, filters: Tensor, how: Geometry) -> Tensor:
        y = torch.conv2d(image, filters, None, how.stride, how.padding, how.dilation, groups)
        return y.contiguous(memory_format=layout.inner)

    def epilogue(p: Tensor, q: Tensor, y: Tensor, q_copy: Tensor | None, block: slice) -> None:
        channel_epilogue_forward(
            address(p), address(q), address(scale[block]), address(_part(shift, block)), address(y), address(q_copy),
            *layout.core(block, groups), relu, torch.get_num_threads(),
        )  # fmt: skip

    if layout.by_blocks:
        _keep_freed_memory()
    if projection is not None:
        of_w, of_a, of_b = (_laid_out(filters, layout.inner) for filters in (weight, response_weight, projection))
        y = _empty(layout.output, layout.outer) if layout.by_blocks or layout.converts else None
        kept: list[Tensor] = []
        for block in layout.blocks():
            image = _image(x, block, layout)
            p, u = convolve(image, of_w, geometry), convolve(image, of_b, geometry)
            y = p if y is None else y
            epilogue(p, convolve(u, of_a, joined.pointwise(geometry)), y[block], None, block)
            if save_response:
                kept.append(u)
        assert y is not None
        return y, _one(kept, layout.outer) if save_response else None

    if not layout.joined:
        everything = slice(0, len(x))
        image = _image(x, everything, layout)
        p, q = (convolve(image, _laid_out(filters, layout.inner), geometry) for filters in (weight, response_weight))
        y = _empty(layout.output, layout.outer) if layout.converts else p
        epilogue(p, q, y, None, everything)
        return y, q.unflatten(1, (groups, -1)) if save_response else None

    filters = _joined(weight, response_weight, groups, layout.inner)
    y = _empty(layout.output, layout.outer)
    saved = _empty(layout.output, layout.inner) if save_response else None
    for block in layout.blocks():
        both = convolve(_image(x, block, layout), filters, geometry)
        epilogue(both, _second(both, groups), y[block], _part(saved, block), block)
    return y, None if saved is None else saved.unflatten(1, (groups, -1))


def _one(parts: list[Tensor], layout: torch.memory_format) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.contiguous(memory_format=layout)


def backward(
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    y: Tensor | None,
    q: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> Gradients:
    from stn_fast._C import channel_epilogue_backward

    layout = plan(x, parameters.weight, geometry, parameters.response_projection is not None)
    groups = geometry.groups
    scale, _ = gates(without_biases(parameters), h)
    d_scale = torch.empty_like(scale) if wanted.scale else None
    d_shift = torch.empty_like(scale) if wanted.shift and parameters.response_bias is not None else None

    def epilogue(of_q: Tensor | None, d_p: Tensor | None, d_q: Tensor | None, block: slice) -> None:
        channel_epilogue_backward(
            address(dy[block]), address(_part(y, block)), address(of_q), address(scale[block]),
            address(d_p), address(d_q), address(_part(d_scale, block)), address(_part(d_shift, block)),
            *layout.core(block, groups), torch.get_num_threads(),
        )  # fmt: skip

    run = _backward_of_low_rank if layout.low_rank else _backward_by_blocks if layout.joined else _backward_at_once
    dx, filters = run(epilogue, dy, x, parameters, q, y, layout, geometry, wanted)
    of_filters = {
        name: d if d is None or not layout.converts else _put(d, torch.empty_like(getattr(parameters, name)), layout)
        for name, d in zip(("weight", "response_weight", "response_projection"), filters, strict=False)
    }
    of_gates = gate_gradients(d_scale, d_shift, parameters, h, wanted)
    return gradients(of_gates, x=dx, **of_filters)


_Epilogue = Callable[[Tensor | None, Tensor | None, Tensor | None, slice], None]
_Products = tuple[Tensor | None, list[Tensor | None]]  # dx and (dW, dR) or (dW, dA, dB) in the library's layout


def _backward_at_once(
    epilogue: _Epilogue,
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    q: Tensor,
    y: Tensor | None,
    layout: Plan,
    geometry: Geometry,
    wanted: Wanted,
) -> _Products:
    """From two convolutions; where dy lies as P does and no ReLU follows, it is the gradient of P."""
    everything, saved = slice(0, len(x)), _saved(q, layout, wanted)
    wants_p, wants_q = wanted.x or wanted.weight, wanted.x or wanted.response_weight
    as_it_is = y is None and not layout.converts

    def empty() -> Tensor:
        return _empty(layout.output, layout.inner)

    d_p = empty() if wants_p and not as_it_is else None
    d_q = empty() if wants_q else None
    epilogue(saved, d_p, d_q, everything)
    if as_it_is:
        d_p = dy
    image = _image(x, everything, layout) if wants_p or wants_q else x
    dx = d_weight = d_response_weight = None
    if wants_p and d_p is not None:
        filters = _laid_out(parameters.weight, layout.inner)
        dx, d_weight = joined.convolution_gradients(d_p, image, filters, geometry, wanted.x, wanted.weight)
    if d_q is not None:
        filters = _laid_out(parameters.response_weight, layout.inner)
        more, d_response_weight = joined.convolution_gradients(
            d_q, image, filters, geometry, wanted.x, wanted.response_weight
        )
        dx = dx.add_(more) if dx is not None and more is not None else dx
    if dx is not None and layout.converts:
        dx = _put(dx, torch.empty_like(x), layout)
    return dx, [d_weight, d_response_weight]


def _backward_by_blocks(
    epilogue: _Epilogue,
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    q: Tensor,
    y: Tensor | None,
    layout: Plan,
    geometry: Geometry,
    wanted: Wanted,
) -> _Products:
    """From the joined convolution; dW and dR add up over the blocks."""
    saved = _saved(q, layout, wanted)
    if not (wanted.x or wanted.weight or wanted.response_weight):
        for block in layout.blocks():
            epilogue(_part(saved, block), None, None, block)
        return None, [None, None]
    _, outputs, *pixels = layout.output
    filters = _joined(parameters.weight, parameters.response_weight, geometry.groups, layout.inner)
    memory = _empty((layout.step, 2 * outputs, *pixels), layout.inner)
    dx = torch.empty_like(x) if wanted.x else None
    totals: list[Tensor | None] = [None, None]
    for block in layout.blocks():
        d_both = memory[: block.stop - block.start]
        epilogue(_part(saved, block), d_both, _second(d_both, geometry.groups), block)
        image = _image_for(wanted.weight or wanted.response_weight, x, block, layout)
        of_x, of_filters = joined.joined_gradients(d_both, image, filters, geometry, wanted)
        if dx is not None and of_x is not None:
            _put(of_x, dx[block], layout)
        _add(totals, of_filters)
    return dx, totals


def _backward_of_low_rank(
    epilogue: _Epilogue,
    dy: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    u: Tensor,
    y: Tensor | None,
    layout: Plan,
    geometry: Geometry,
    wanted: Wanted,
) -> _Products:
    """From the convolutions with W, A and B, by blocks where images are large; a block's Q is made again from u."""
    names = ("weight", "response_weight", "response_projection")
    filters = {name: _laid_out(getattr(parameters, name), layout.inner) for name in names}
    parameters = parameters._replace(**filters)
    groups = geometry.groups
    of_response = wanted.x or wanted.response_weight or wanted.response_projection
    reads_u, reads_x = wanted.scale or wanted.response_weight, wanted.weight or wanted.response_projection
    as_it_is = y is None and not layout.converts
    _, *of_image = layout.output
    d_p = d_q = None
    if (wanted.x or wanted.weight) and not as_it_is:
        d_p = _empty((layout.step, *of_image), layout.inner)
    if of_response:
        d_q = _empty((layout.step, *of_image), layout.inner)
    in_place = not (layout.by_blocks or layout.converts)
    dx = torch.empty_like(x) if wanted.x and not in_place else None
    totals: list[Tensor | None] = [None, None, None]
    for block in layout.blocks():
        examples = slice(0, block.stop - block.start)
        of_u = _image(u, block, layout) if reads_u else u
        of_q = None
        if wanted.scale:
            of_q = torch.conv2d(of_u, parameters.response_weight, groups=groups)
            of_q = of_q.contiguous(memory_format=layout.inner)
        to_p, to_q = _part(d_p, examples), _part(d_q, examples)
        epilogue(of_q, to_p, to_q, block)
        of_x = d_weight = None
        image = _image_for(reads_x, x, block, layout)
        if wanted.x or wanted.weight:
            of_p = dy[block] if to_p is None else to_p
            of_x, d_weight = joined.convolution_gradients(
                of_p, image, parameters.weight, geometry, wanted.x, wanted.weight
            )
        if to_q is not None:
            more, *of_factors = joined.response_gradients(to_q, image, of_u, parameters, geometry, wanted)
            of_x = of_x.add_(more) if of_x is not None and more is not None else of_x
            _add(totals, (d_weight, *of_factors))
        else:
            _add(totals, (d_weight,))
        if in_place:
            dx = of_x
        elif dx is not None and of_x is not None:
            _put(of_x, dx[block], layout)
    return dx, totals


def _saved(q: Tensor, layout: Plan, wanted: Wanted) -> Tensor | None:
    return q.flatten(1, 2).contiguous(memory_format=layout.inner) if wanted.scale else None


def _image_for(reads: bool, x: Tensor, block: slice, layout: Plan) -> Tensor:
    """A block of x in the library's layout, or memory like it where only the shape and layout are needed."""
    return _image(x, block, layout) if reads else _empty(x[block].shape, layout.inner)


def _add(totals: list[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    for i, part in enumerate(parts):
        total = totals[i]
        totals[i] = part if total is None or part is None else total.add_(part)


def _joined(weight: Tensor, response_weight: Tensor, groups: int, layout: torch.memory_format) -> Tensor:
    """The filters [W; R] in the library's layout."""
    if groups == 1 and (stored := as_one(weight, response_weight)) is not None:
        return _laid_out(stored, layout)
    outputs, inputs, *kernel = weight.shape
    joined = _empty((2 * outputs, inputs, *kernel), layout)
    halves = joined.unflatten(0, (groups, 2, -1))
    for half, filters in enumerate((weight, response_weight)):
        if groups == 1:
            _laid_out(filters, layout, to=halves[0, half])
        else:
            halves[:, half].copy_(filters.unflatten(0, (groups, -1)))
    return joined


def _laid_out(filters: Tensor, layout: torch.memory_format, to: Tensor | None = None) -> Tensor:
    """Contiguous or channels_last filters in the library's layout, in `to` if given.

    Its strides are spelled out by _empty: contiguous() leaves those of filters over one channel ambiguous.
    """
    from stn_fast._C import transpose

    converts = layout == torch.channels_last and filters.is_contiguous()
    if to is None:
        if not converts:
            return filters
        to = _empty(filters.shape, layout)
    if not converts:
        return to.copy_(filters)
    outputs, inputs, *kernel = filters.shape
    transpose(address(filters), address(to), outputs, inputs, math.prod(kernel), torch.get_num_threads())
    return to


def _second(both: Tensor, groups: int) -> Tensor:
    """From where Q lies in (B, groups · 2 · O/groups, Ho, Wo)."""
    return both[:, both.shape[1] // (2 * groups) :]


def _part(tensor: Tensor | None, block: slice) -> Tensor | None:
    return None if tensor is None else tensor[block]


def _image(x: Tensor, block: slice, layout: Plan) -> Tensor:
    """A block of x in the library's layout."""
    from stn_fast._C import transpose

    part = x[block]
    if not layout.converts:
        return part
    image = _empty(part.shape, layout.inner)
    batch, channels, height, width = part.shape
    transpose(address(part), address(image), batch, channels, height * width, torch.get_num_threads())
    return image


def _put(part: Tensor, to: Tensor, layout: Plan) -> Tensor:
    """Writes a result in the library's layout into one of the caller's."""
    from stn_fast._C import transpose

    if not layout.converts:
        return to.copy_(part)
    part = part.contiguous(memory_format=layout.inner)
    batch, channels, height, width = part.shape
    transpose(address(part), address(to), batch, height * width, channels, torch.get_num_threads())
    return to
