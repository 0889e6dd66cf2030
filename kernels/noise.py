"""Gaussian noise, one scale per example: y = x + scale[b] * normal(element); d_scale[b] = sum dy * normal(element)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, narrow, refuse_float64, words_in_range
from .random import draw_words, normals_in_order, quads_of_rows
from .tiles import ALIGNED, SHIFTED, Rows


@triton.jit(do_not_specialize=["first_example", "seed", "stream"])
def noise_kernel(
    p_x,
    p_scale,
    p_step,
    p_out,
    rows,
    batch,
    columns,
    e_outer,
    column_tiles,
    first_example,
    seed,
    stream,
    BACKWARD: tl.constexpr,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Forward: p_x holds x, p_out y. Backward: p_x holds dy, p_out (rows, column_tiles) sums of dy * normal."""
    i_tile = tl.program_id(0) % column_tiles
    i_row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_row = i_row < rows
    i_example = i_row % batch
    quad, i_column = quads_of_rows(i_row // batch * e_outer, i_tile, MODE == 0, COLS)
    w0, w1, w2, w3 = draw_words(quad, (first_example + i_example)[:, None], p_step, seed, stream)
    b_normal = normals_in_order(w0, w1, w2, w3)

    inside = in_row[:, None] & (i_column >= 0) & (i_column < columns)
    i_x = (i_row * columns)[:, None] + i_column
    b_x = tl.load(p_x + i_x, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        tl.store(p_out + i_row * column_tiles + i_tile, tl.sum(b_x * b_normal, axis=1), mask=in_row)
    else:
        b_scale = tl.load(p_scale + i_example, mask=in_row, other=0.0).to(tl.float32)
        b_y = b_x + b_scale[:, None] * b_normal
        tl.store(p_out + i_x, narrow(b_y, p_out.dtype.element_ty), mask=inside)


def _rows(sizes: tuple[int, ...]) -> Rows:
    outer, batch, inner = sizes
    e_outer = 0 if outer == 1 else inner
    mode = ALIGNED if e_outer % 4 == 0 else SHIFTED
    return Rows(outer * batch, batch, 1, inner, e_outer, 0, 1, mode)


def _launch(
    x: Tensor,
    scale: Tensor,
    out: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    view: Rows,
    backward: bool,
) -> None:
    tile = view.tile()
    column_tiles = view.column_tiles(tile)
    first_example, stream = words_in_range(first_example, stream)
    with device_guard(x):
        noise_kernel[(view.row_tiles(tile) * column_tiles,)](
            x,
            scale,
            step,
            out,
            view.rows,
            view.batch,
            view.columns,
            view.e_outer,
            column_tiles,
            first_example,
            seed,
            stream,
            BACKWARD=backward,
            MODE=view.mode,
            num_warps=tile.num_warps,
            **tile.kwargs,
        )


def noise_forward(
    x: Tensor,
    scale: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: tuple[int, ...],
) -> Tensor:
    """y for x contiguous, (outer, batch, inner) = `sizes`, and scale (batch,); element = i_outer * inner + i_inner.

    Raises TypeError for float64, and ValueError for an inner size of more than tiles.MAX_COLUMNS.
    """
    refuse_float64("noise", x=x)
    view = _rows(sizes)
    y = torch.empty_like(x)
    if x.numel():
        _launch(x, scale, y, step, seed, stream, first_example, view, backward=False)
    return y


def noise_backward(
    dy: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: tuple[int, ...],
) -> Tensor:
    """d_scale (batch,) float32, the noise drawn again. dx is dy itself. Raises as the forward does."""
    refuse_float64("noise", dy=dy)
    view = _rows(sizes)
    outer, batch, _ = sizes
    if not dy.numel():
        return dy.new_zeros(batch, dtype=torch.float32)
    column_tiles = view.column_tiles(view.tile())
    # Each program sums its own tile and the sums are added in a fixed order: the same bits at every run.
    partial = torch.empty(outer, batch, column_tiles, dtype=torch.float32, device=dy.device)
    _launch(dy, dy, partial, step, seed, stream, first_example, view, backward=True)
    return partial.sum((0, 2))
