"""Dropout with one rate per example: y = x * keep / (1 - rate[b]), keep iff the element's uniform number >= rate[b]."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, narrow, refuse_float64, words_in_range
from .random import draw_words, in_element_order, quads_of_rows, uniform_of, word_of
from .tiles import rows_of


@triton.jit(do_not_specialize=["first_example", "seed", "stream"])
def dropout_kernel(
    p_x,
    p_rate,
    p_step,
    p_y,
    rows,
    batch,
    middle,
    columns,
    e_outer,
    e_middle,
    e_last,
    column_tiles,
    first_example,
    seed,
    stream,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_tile = tl.program_id(0) % column_tiles
    i_row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_row = i_row < rows
    i_example = (i_row // middle) % batch
    base = i_row // middle // batch * e_outer + i_row % middle * e_middle

    b_rate = tl.load(p_rate + i_example, mask=in_row, other=0.0).to(tl.float32)
    example = (first_example + i_example)[:, None]
    if MODE <= 1:
        quad, i_column = quads_of_rows(base, i_tile, MODE == 0, COLS)
        w0, w1, w2, w3 = draw_words(quad, example, p_step, seed, stream)
        b_word = in_element_order(w0, w1, w2, w3)
    else:
        i_column = (i_tile * COLS + tl.arange(0, COLS))[None, :]
        element = base[:, None]
        if MODE == 3:
            element += i_column.to(tl.int64) * e_last
        w0, w1, w2, w3 = draw_words(element // 4, example, p_step, seed, stream)
        b_word = word_of(element, w0, w1, w2, w3)
    keep = uniform_of(b_word) >= b_rate[:, None]

    inside = in_row[:, None] & (i_column >= 0) & (i_column < columns)
    i_x = (i_row * columns)[:, None] + i_column
    b_x = tl.load(p_x + i_x, mask=inside, other=0.0).to(tl.float32)
    # Chosen, not multiplied: a dropped element is 0 even where x or the scale is infinite.
    b_y = tl.where(keep, b_x * (1.0 / (1.0 - b_rate))[:, None], 0.0)
    tl.store(p_y + i_x, narrow(b_y, p_y.dtype.element_ty), mask=inside)


def dropout(
    x: Tensor,
    rate: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    """Drops elements of x, contiguous and seen as (outer, batch, middle, last) = `sizes`. Its own backward, on dy.

    rate is (batch,); element = i_outer * strides[0] + i_middle * strides[1] + i_last * strides[2], where a stride of 0
    shares the mask; step is a 0-dim int64 tensor on the device of x. Raises TypeError for float64, and ValueError for
    rows of more than tiles.MAX_COLUMNS.
    """
    refuse_float64("dropout", x=x)
    view = rows_of(sizes, strides)
    y = torch.empty_like(x)
    if not x.numel():
        return y
    tile = view.tile()
    column_tiles = view.column_tiles(tile)
    first_example, stream = words_in_range(first_example, stream)
    with device_guard(x):
        dropout_kernel[(view.row_tiles(tile) * column_tiles,)](
            x,
            rate,
            step,
            y,
            view.rows,
            view.batch,
            view.middle,
            view.columns,
            view.e_outer,
            view.e_middle,
            view.e_last,
            column_tiles,
            first_example,
            seed,
            stream,
            MODE=view.mode,
            num_warps=tile.num_warps,
            **tile.kwargs,
        )
    return y
