"""What is left of a gated convolution once the library has computed both branches: one pass to y.

`both` (B, 2·O, H, W) = conv(x, [W; R]) holds the branches P and Q group by group: group j has channels [P_j, Q_j].
Gates are tables with a number per example and channel: y = P + scale ⊙ Q + shift, then max(y, 0) where asked. P and Q
may also be tensors of their own, as of a response of low rank.

The pass is over rows whose columns are contiguous in y, and in both halves of `both`. Contiguous images: a row is an
example's group, its columns are channels by pixels. channels_last: a row is a pixel, its columns are channels.
"""
# ruff: noqa: E741 (O outputs)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, device_guard, narrow, refuse_float64

# 2048 numbers a program, 8 a thread.
TILES = [
    triton.Config({"ROWS": 128, "COLS": 16}, num_warps=8),
    triton.Config({"ROWS": 32, "COLS": 64}, num_warps=8),
    triton.Config({"ROWS": 8, "COLS": 256}, num_warps=8),
    triton.Config({"ROWS": 2, "COLS": 1024}, num_warps=8),
]
# Of P and Q apart, 4 a thread: with 8, some spill.
APART_TILES = [
    triton.Config({"ROWS": 64, "COLS": 16}, num_warps=8),
    triton.Config({"ROWS": 16, "COLS": 64}, num_warps=8),
    triton.Config({"ROWS": 4, "COLS": 256}, num_warps=8),
    triton.Config({"ROWS": 1, "COLS": 1024}, num_warps=8),
]
MAX_COLUMNS = 2**31 - 1024  # kernels number them in 32 bits, whole tiles of them


def tile_for(columns: int, tiles: list[triton.Config] = TILES) -> triton.Config:
    """The longest rows that leave at most an eighth of a tile's work empty."""

    def covered(tile: triton.Config) -> int:
        return ceil_div(columns, tile.kwargs["COLS"]) * tile.kwargs["COLS"]

    return next((tile for tile in reversed(tiles) if covered(tile) <= columns + columns // 8), tiles[0])


@triton.jit
def gated_conv2d_epilogue_fwd_kernel(
    p_both,
    p_q,
    p_scale,
    p_shift,
    p_y,
    rows,
    columns,
    O,
    each,
    pixels,
    column_tiles,
    CHANNELS_LAST: tl.constexpr,
    GROUPED: tl.constexpr,
    APART: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`each` is the number of outputs of a group. Where P and Q are APART, p_both is P."""
    i_row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = (tl.program_id(0) % column_tiles) * COLS + tl.arange(0, COLS)
    inside = (i_row < rows)[:, None] & (i_column < columns)[None, :]
    if APART:
        i_p = i_row[:, None] * columns + i_column[None, :]
        if CHANNELS_LAST:
            i_gate = (i_row // pixels * O)[:, None] + i_column[None, :]
        else:
            i_gate = (i_row * each)[:, None] + (i_column // pixels)[None, :]
        b_y = tl.load(p_both + i_p, mask=inside, other=0.0).to(tl.float32)
        b_q = tl.load(p_q + i_p, mask=inside, other=0.0).to(tl.float32)
    else:
        i_p = i_row[:, None] * 2 * columns + i_column[None, :]
        if CHANNELS_LAST:
            i_gate = (i_row // pixels * O)[:, None] + i_column[None, :]
            if GROUPED:
                i_p += (i_column // each * each)[None, :]
            i_q = i_p + each
        else:
            i_gate = (i_row * each)[:, None] + (i_column // pixels)[None, :]
            i_q = i_p + columns
        b_y = tl.load(p_both + i_p, mask=inside, other=0.0).to(tl.float32)
        b_q = tl.load(p_both + i_q, mask=inside, other=0.0).to(tl.float32)
    b_y += tl.load(p_scale + i_gate, mask=inside, other=0.0).to(tl.float32) * b_q
    if HAS_SHIFT:
        b_y += tl.load(p_shift + i_gate, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    tl.store(p_y + i_row[:, None] * columns + i_column[None, :], narrow(b_y, p_y.dtype.element_ty), mask=inside)


def epilogue_forward(
    both: Tensor, scale: Tensor, shift: Tensor | None, groups: int, relu: bool, q: Tensor | None = None
) -> Tensor:
    """y (B, O, H, W) in the memory format and dtype of `both` (B, 2·O, H, W).

    scale and shift are (B, O) tables of any floating dtype; arithmetic is in float32. With q (B, O, H, W), `both` is P
    alone, of its shape, and q is read in the memory format of P.

    Raises:
        TypeError: both is float64. ValueError: it is neither contiguous nor channels_last, or too large.
    """
    refuse_float64("gated_conv2d", both=both)
    batch, outputs, (height, width) = both.shape[0], both.shape[1] // (2 if q is None else 1), both.shape[2:]
    pixels, each = height * width, outputs // groups
    layout = torch.contiguous_format if both.is_contiguous() else torch.channels_last
    if not both.is_contiguous(memory_format=layout):
        raise ValueError(
            f"gated_conv2d: both must be contiguous or channels_last; got {tuple(both.shape)}, strides {both.stride()}"
        )
    channels_last = layout == torch.channels_last
    rows, columns = (batch * pixels, outputs) if channels_last else (batch * groups, each * pixels)
    if columns > MAX_COLUMNS:
        raise ValueError(f"gated_conv2d: at most {MAX_COLUMNS} numbers in a group of an example; got {columns}")
    y = torch.empty((batch, outputs, height, width), dtype=both.dtype, device=both.device, memory_format=layout)
    tile = tile_for(columns, TILES if q is None else APART_TILES)
    column_tiles = ceil_div(columns, tile.kwargs["COLS"])
    with device_guard(both):
        gated_conv2d_epilogue_fwd_kernel[(ceil_div(rows, tile.kwargs["ROWS"]) * column_tiles,)](
            both,
            None if q is None else q.contiguous(memory_format=layout),
            scale.contiguous(),
            None if shift is None else shift.contiguous(),
            y,
            rows,
            columns,
            outputs,
            each,
            pixels,
            column_tiles,
            CHANNELS_LAST=channels_last,
            GROUPED=channels_last and groups > 1 and q is None,
            APART=q is not None,
            HAS_SHIFT=shift is not None,
            RELU=relu,
            num_warps=tile.num_warps,
            **tile.kwargs,
        )
    return y
