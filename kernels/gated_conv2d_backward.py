"""Backward of a gated convolution's epilogue: the gradients of both branches and of the gate tables in one pass.

With y = P + scale ⊙ Q + shift, then max(y, 0) where asked: dP = dy where y > 0, dQ = dP ⊙ scale, and with sums over
the pixels of an example d_scale = Σ dP ⊙ Q, d_shift = Σ dP.

A program sums over tiles of channels by pixels of one example. Where there are too few examples and channels to fill a
device, pixels are split among programs; their partial sums are added in a fixed order.
"""
# ruff: noqa: E741 (O outputs)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, device_guard, narrow, refuse_float64, split

# 1024 numbers at a time, at most 8 a thread: more spill where rows don't begin at 16 bytes. Pixels lie side by side in
# contiguous images, channels in channels_last ones.
CONTIGUOUS_TILES = [
    triton.Config({"BLOCK_O": 64, "BLOCK_P": 16}, num_warps=4),
    triton.Config({"BLOCK_O": 16, "BLOCK_P": 64}, num_warps=4),
    triton.Config({"BLOCK_O": 8, "BLOCK_P": 128}, num_warps=4),
]
CHANNELS_LAST_TILES = [
    triton.Config({"BLOCK_O": 16, "BLOCK_P": 64}, num_warps=8),
    triton.Config({"BLOCK_O": 64, "BLOCK_P": 16}, num_warps=4),
]
# Of dP and dQ apart; the larger one with 4 warps spills.
APART_LAST_TILES = [
    triton.Config({"BLOCK_O": 16, "BLOCK_P": 64}, num_warps=8),
    triton.Config({"BLOCK_O": 64, "BLOCK_P": 16}, num_warps=8),
]
# Programs that pixels are split into, at least, where there are that many tiles: eight for each multiprocessor of large
# devices, as many as it takes to keep its memory busy. A constant, so that results don't depend on the device.
PROGRAMS = 1056


def tile_for(channels_last: bool, outputs: int, pixels: int, apart: bool = False) -> triton.Config:
    """The longest rows that leave at most a third of a tile's work empty."""
    last_tiles = APART_LAST_TILES if apart else CHANNELS_LAST_TILES
    tiles, axis, size = (last_tiles, "BLOCK_O", outputs) if channels_last else (CONTIGUOUS_TILES, "BLOCK_P", pixels)

    def covered(tile: triton.Config) -> int:
        return ceil_div(size, tile.kwargs[axis]) * tile.kwargs[axis]

    return next((tile for tile in reversed(tiles) if 2 * covered(tile) <= 3 * size), tiles[0])


@triton.jit
def gated_conv2d_epilogue_bwd_kernel(
    p_dy,
    p_y,
    p_q,
    p_scale,
    p_d_both,
    p_scale_partial,
    p_shift_partial,
    batch,
    O,
    each,
    pixels,
    q_batch,
    q_group,
    q_pixel,
    both_pixel,
    tiles_each,
    CHANNELS_LAST: tl.constexpr,
    GROUPED: tl.constexpr,
    APART: tl.constexpr,
    RELU: tl.constexpr,
    WANT_BOTH: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    WANT_SHIFT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums over `tiles_each` tiles of pixels (splits, batch, O); `each` is the number of outputs of a group.

    d_both is [dP, dQ], side by side in each group of each example's channels, or APART one after the other.
    """
    tiles_o = tl.cdiv(O, BLOCK_O)
    i_split = tl.program_id(1)
    i_example = (tl.program_id(0) // tiles_o).to(tl.int64)
    i_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = i_o < O
    i_gate = i_example * O + i_o
    # Where a channel begins in q, and which of [P_j, Q_j]'s it is; Q_j comes `each` channels later.
    i_q_channel, i_p_channel = i_o, i_o
    if GROUPED:
        i_q_channel = i_o % each
        if not APART:
            i_p_channel = i_o + i_o // each * each
    i_q_first = i_q_channel if CHANNELS_LAST else i_q_channel.to(tl.int64) * pixels
    if GROUPED:
        i_q_first += (i_o // each).to(tl.int64) * q_group
    if WANT_BOTH:
        b_s = tl.load(p_scale + i_gate, mask=in_o, other=0.0).to(tl.float32)[:, None]
    b_scale = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    b_shift = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for tile in range(i_split * tiles_each, (i_split + 1) * tiles_each):
        i_pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = in_o[:, None] & (i_pixel < pixels)[None, :]
        i_row = i_example * pixels + i_pixel
        if CHANNELS_LAST:
            i_y = (i_row * O)[None, :] + i_o[:, None]
            i_q = i_q_first[:, None] + (i_pixel.to(tl.int64) * q_pixel)[None, :]
            i_both = (i_row * both_pixel)[None, :] + i_p_channel[:, None]
            to_q = each
        else:
            i_y = (i_gate * pixels)[:, None] + i_pixel[None, :]
            i_q = i_q_first[:, None] + i_pixel[None, :]
            i_both = ((i_example * 2 * O + i_p_channel) * pixels)[:, None] + i_pixel[None, :]
            to_q = tl.cast(each, tl.int64) * pixels
        if APART:
            i_both = i_y
            to_q = tl.cast(batch, tl.int64) * O * pixels
        b_dy = tl.load(p_dy + i_y, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            # As torch's rule: where y is NaN the gradient passes.
            b_dy = tl.where(tl.load(p_y + i_y, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, b_dy)
        if WANT_SHIFT:
            b_shift += b_dy
        if WANT_SCALE:
            b_scale += b_dy * tl.load(p_q + i_example * q_batch + i_q, mask=inside, other=0.0).to(tl.float32)
        if WANT_BOTH:
            tl.store(p_d_both + i_both, narrow(b_dy, p_d_both.dtype.element_ty), mask=inside)
            tl.store(p_d_both + i_both + to_q, narrow(b_dy * b_s, p_d_both.dtype.element_ty), mask=inside)
    i_partial = i_split.to(tl.int64) * batch * O + i_gate
    if WANT_SCALE:
        tl.store(p_scale_partial + i_partial, tl.sum(b_scale, axis=1), mask=in_o)
    if WANT_SHIFT:
        tl.store(p_shift_partial + i_partial, tl.sum(b_shift, axis=1), mask=in_o)


def _pixel_stride(q: Tensor) -> int:
    """How far a pixel of q (B, groups, each, H, W) is from the next one; 1 in contiguous images."""
    width, (step_h, step_w) = q.shape[4], q.stride()[3:]
    pixel = step_w if width > 1 else step_h
    channel = 1 if pixel != 1 else q.shape[3] * width
    expected = {2: channel, 3: pixel * width, 4: pixel}
    if any(q.shape[dim] > 1 and q.stride(dim) != step for dim, step in expected.items()):
        raise ValueError(
            "gated_conv2d: q must be a view (B, groups, O/groups, H, W) of contiguous or channels_last images; "
            f"got {tuple(q.shape)}, strides {q.stride()}"
        )
    return pixel


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
    """(d_both (B, 2·O, H, W), d_scale, d_shift), None where not wanted; the tables are parts to be added up,
    (splits, B, O) float32. With `apart`, d_both is (2·B, O, H, W): dP, then dQ.

    dy, y: (B, O, H, W), best in the memory format of q; y is None unless `relu`.
    q: (B, groups, O/groups, H, W), the second half of every group of `both`, with whatever strides that leaves. It is
        looked at for d_scale alone; otherwise dy says how d_both is to lie.
    scale: (B, O), of any floating dtype.

    Raises:
        TypeError: dy is float64. ValueError: q is not of contiguous or channels_last images.
    """
    refuse_float64("gated_conv2d", dy=dy)
    batch, outputs, height, width = dy.shape
    pixels = height * width
    q_strides = (q.stride(0), q.stride(1), _pixel_stride(q)) if wants_scale else (0, 0, 0)
    channels_last = pixels == 1 or (q_strides[2] != 1 if wants_scale else not dy.is_contiguous())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dy = dy.contiguous(memory_format=layout)
    y = y.contiguous(memory_format=layout) if relu and y is not None else None

    tile = tile_for(channels_last, outputs, pixels, apart)
    programs = batch * ceil_div(outputs, tile.kwargs["BLOCK_O"])
    splits, tiles_each = split(programs, ceil_div(pixels, tile.kwargs["BLOCK_P"]), PROGRAMS)
    d_both = d_scale = d_shift = None
    if wants_both:
        shape = (2 * batch, outputs, height, width) if apart else (batch, 2 * outputs, height, width)
        d_both = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)
    if wants_scale:
        d_scale = torch.empty(splits, batch, outputs, dtype=torch.float32, device=dy.device)
    if wants_shift:
        d_shift = torch.empty(splits, batch, outputs, dtype=torch.float32, device=dy.device)
    with device_guard(dy):
        gated_conv2d_epilogue_bwd_kernel[(programs, splits)](
            dy,
            y,
            q if wants_scale else None,
            scale.contiguous(),
            d_both,
            d_scale,
            d_shift,
            batch,
            outputs,
            outputs // groups,
            pixels,
            *q_strides,
            outputs if apart else 2 * outputs,
            tiles_each,
            CHANNELS_LAST=channels_last,
            GROUPED=groups > 1,
            APART=apart,
            RELU=relu,
            WANT_BOTH=wants_both,
            WANT_SCALE=wants_scale,
            WANT_SHIFT=wants_shift,
            num_warps=tile.num_warps,
            **tile.kwargs,
        )
    return d_both, d_scale, d_shift


def epilogue_backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`epilogue_partials`, added up: tables (B, O)."""
    d_both, d_scale, d_shift = epilogue_partials(*arguments)
    return d_both, None if d_scale is None else d_scale.sum(0), None if d_shift is None else d_shift.sum(0)
