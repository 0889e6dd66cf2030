"""How tensors seen as rows of columns are cut into tiles, for the element-wise random kernels.

A row is one (outer, batch, middle) position; its columns are contiguous in memory. Elements are numbered per example,
element = i_outer * e_outer + i_middle * e_middle + i_column * e_last, and four neighbours share one Philox counter.
"""

from dataclasses import dataclass

import triton

from .launch import ceil_div

# Few columns, many rows, or the reverse: 2048 numbers a program, 16 a thread. The first to hold a whole row is taken.
TILES = [
    triton.Config({"ROWS": 128, "COLS": 16}, num_warps=4),
    triton.Config({"ROWS": 16, "COLS": 128}, num_warps=4),
    triton.Config({"ROWS": 2, "COLS": 1024}, num_warps=4),
]

# Kernels number columns in 32 bits; whole tiles of them must fit, after the three that may come before the first.
MAX_COLUMNS = 2**31 - 1027

# How a tile finds its words.
ALIGNED = 0  # every row starts at a multiple of four elements: one counter gives four neighbouring columns
SHIFTED = 1  # the same, but rows start anywhere
SHARED = 2  # one number for all columns of a row
STRIDED = 3  # anything else: a counter per number


@dataclass(frozen=True)
class Rows:
    """A tensor as rows of columns, with the numbering of its elements."""

    rows: int
    batch: int
    middle: int
    columns: int
    e_outer: int
    e_middle: int
    e_last: int
    mode: int

    def __post_init__(self) -> None:
        if self.columns > MAX_COLUMNS:
            raise ValueError(
                f"column numbers are 32 bits wide, so at most {MAX_COLUMNS} elements of an example can lie in one row; "
                f"got {self.columns}"
            )

    def tile(self) -> triton.Config:
        return next((tile for tile in TILES if tile.kwargs["COLS"] >= self.columns), TILES[-1])

    def column_tiles(self, tile: triton.Config) -> int:
        # A shifted row begins up to three columns before its first.
        extent = self.columns + (3 if self.mode == SHIFTED else 0)
        return ceil_div(extent, tile.kwargs["COLS"])

    def row_tiles(self, tile: triton.Config) -> int:
        return ceil_div(self.rows, tile.kwargs["ROWS"])


def rows_of(sizes: tuple[int, ...], strides: tuple[int, ...]) -> Rows:
    """Merges `middle` into `last` where the numbering allows it, so that rows are as long as they can be."""
    outer, batch, middle, last = sizes
    e_outer, e_middle, e_last = strides
    if last == 1:
        middle, last, e_middle, e_last = 1, middle, 0, e_middle
    elif middle == 1 or e_middle == e_last * last:
        middle, last, e_middle = 1, middle * last, 0
    e_outer = 0 if outer == 1 else e_outer
    if last == 1 or e_last == 0:
        mode = SHARED
    elif e_last != 1:
        mode = STRIDED
    elif e_outer % 4 == 0 and e_middle % 4 == 0:
        mode = ALIGNED
    else:
        mode = SHIFTED
    return Rows(outer * batch * middle, batch, middle, last, e_outer, e_middle, e_last, mode)
