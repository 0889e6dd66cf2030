"""Embedding rows under gates in one pass: e[m] = scale[t] (E[t] + s[b] ⊙ R[t]), t the word of row m and b its example.

The gates s are a table (batch, D) with a row for every example. A tile is rows by columns, its words loaded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, device_guard, narrow, refuse_float64

# 2048 numbers a program, 8 a thread.
TILES = [
    triton.Config({"ROWS": 64, "COLS": 32}, num_warps=8),
    triton.Config({"ROWS": 16, "COLS": 128}, num_warps=8),
    triton.Config({"ROWS": 4, "COLS": 512}, num_warps=8),
]


def tile_for(columns: int) -> triton.Config:
    """The longest rows that leave at most a fifth of a tile's work empty: 650 columns are six times 128."""

    def covered(tile: triton.Config) -> int:
        return ceil_div(columns, tile.kwargs["COLS"]) * tile.kwargs["COLS"]

    return next((tile for tile in reversed(TILES) if covered(tile) <= columns + columns // 4), TILES[0])


@triton.jit
def gated_embedding_fwd_kernel(
    p_tokens,
    p_weight,
    p_response_weight,
    p_s,
    p_scale,
    p_e,
    p_known,
    rows,
    words,
    batch,
    inner,
    D,
    column_tiles,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = (tl.program_id(0) % column_tiles) * COLS + tl.arange(0, COLS)
    in_row = i_row < rows
    i_word = tl.load(p_tokens + i_row, mask=in_row, other=0)
    unknown = (i_word < 0) | (i_word >= words)
    tl.store(p_known + tl.zeros_like(i_word), 0, mask=unknown)
    in_row &= ~unknown
    inside = in_row[:, None] & (i_column < D)[None, :]
    i_table = i_word[:, None] * D + i_column[None, :]
    i_gate = (i_row // inner % batch)[:, None] * D + i_column[None, :]
    b_e = tl.load(p_weight + i_table, mask=inside, other=0.0).to(tl.float32)
    b_q = tl.load(p_response_weight + i_table, mask=inside, other=0.0).to(tl.float32)
    b_e += tl.load(p_s + i_gate, mask=inside, other=0.0) * b_q
    if HAS_SCALE:
        b_scale = tl.load(p_scale + i_word, mask=in_row, other=0.0)[:, None]
        b_e = tl.where(b_scale == 0.0, 0.0, b_e * b_scale)
    tl.store(p_e + i_row[:, None] * D + i_column[None, :], narrow(b_e, p_e.dtype.element_ty), mask=inside)


def forward(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
) -> Tensor:
    """e (outer·B·inner, D) in the dtype of weight; the gates and the arithmetic are in float32.

    tokens (outer·B·inner,) int64; scale (V,) float32. Raises TypeError for float64.

    Where a token is no row of the tables, the device stops later, as it does for torch.nn.Embedding; on the CPU that is
    a RuntimeError here.
    """
    refuse_float64("gated_embedding", weight=weight)
    rows, columns = len(tokens), weight.shape[1]
    s = h.float() @ weight_gate.float().T
    e = torch.empty((rows, columns), dtype=weight.dtype, device=weight.device)
    known = torch.ones((), dtype=torch.int32, device=weight.device)
    tile = tile_for(columns)
    column_tiles = ceil_div(columns, tile.kwargs["COLS"])
    with device_guard(weight):
        gated_embedding_fwd_kernel[(ceil_div(rows, tile.kwargs["ROWS"]) * column_tiles,)](
            tokens,
            weight,
            response_weight,
            s,
            scale,
            e,
            known,
            rows,
            len(weight),
            len(h),
            inner,
            columns,
            column_tiles,
            HAS_SCALE=scale is not None,
            num_warps=tile.num_warps,
            **tile.kwargs,
        )
    torch._assert_async(known, "gated_embedding: a token is outside of the table")
    return e
