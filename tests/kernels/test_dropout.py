"""dropout against the formula, with masks from the NumPy generator."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast import random
from stn_fast.kernels import tiles
from stn_fast.kernels.dropout import dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# sizes (outer, batch, middle, last), strides of the element number, and how the kernel should find its words
LAYOUTS = {
    "flat, aligned": ((1, 3, 5, 8), (0, 8, 1), tiles.ALIGNED),
    "flat, odd": ((1, 5, 1, 37), (0, 0, 1), tiles.ALIGNED),
    "flat, time first": ((3, 2, 1, 7), (7, 0, 1), tiles.SHIFTED),
    "flat, time first, aligned": ((3, 2, 1, 16), (16, 0, 1), tiles.ALIGNED),
    "flat, several tiles of columns": ((2, 1, 1, 1030), (1030, 0, 1), tiles.SHIFTED),
    "channels": ((1, 3, 7, 9), (0, 1, 0), tiles.SHARED),
    "channels of one pixel": ((1, 3, 7, 1), (0, 1, 0), tiles.ALIGNED),
    "locked, time first": ((5, 2, 1, 19), (0, 0, 1), tiles.ALIGNED),
    "locked, batch first": ((1, 2, 5, 19), (0, 0, 1), tiles.ALIGNED),
    "rows of a strided middle": ((1, 2, 3, 6), (0, 7, 1), tiles.SHIFTED),
    "one for all": ((1, 4, 1, 20), (0, 0, 0), tiles.SHARED),
    "columns last": ((1, 2, 3, 5), (0, 1, 3), tiles.STRIDED),
    "a single number": ((1, 1, 1, 1), (0, 0, 0), tiles.SHARED),
}


def expected(x, rate, draws, sizes, strides):
    """The definition, number by number in plain indexing; draws (batch, elements)."""
    i, _, j, k = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    element = i * strides[0] + j * strides[1] + k * strides[2]
    example = torch.arange(sizes[1]).view(1, -1, 1, 1).expand(sizes)
    keep = draws[example, element].view_as(x) >= rate.view(1, -1, 1, 1).expand(sizes).reshape(x.shape)
    scale = (1 / (1 - rate.double())).view(1, -1, 1, 1).expand(sizes).reshape(x.shape)
    return torch.where(keep, x * scale.to(x.dtype), 0)


def drawn(sizes, strides, step, seed, stream, first_example):
    elements = 1 + sum((size - 1) * s for size, s in zip((sizes[0], *sizes[2:]), strides, strict=True))
    return torch.from_numpy(random.uniform(seed, step, stream, sizes[1], elements, first_example))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_masks_of_the_reference(layout, dtype):
    sizes, strides, mode = LAYOUTS[layout]
    assert tiles.rows_of(sizes, strides).mode == mode
    draw = dict(step=4, seed=2**40 + 3, stream=2, first_example=5)
    rate = torch.linspace(0.1, 0.8, sizes[1])
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    step = torch.tensor(draw.pop("step"), device=DEVICE)
    got = dropout(x.to(DEVICE), rate.to(DEVICE), step, **draw, sizes=sizes, strides=strides).cpu()
    draws = drawn(sizes, strides, 4, **draw)
    want = expected(x, rate, draws, sizes, strides)
    assert torch.equal(got == 0, want == 0)
    assert_twice_as_good(got, want, expected(x.double(), rate, draws, sizes, strides))


def test_a_dropped_element_is_zero_at_any_rate_and_value():
    sizes, strides = (1, 3, 1, 9), (0, 0, 1)
    x = torch.full(sizes, float("inf"), device=DEVICE)
    rate = torch.tensor([1.0, 1.5, 0.0], device=DEVICE)
    y = dropout(x, rate, torch.tensor(0, device=DEVICE), 0, 1, 0, sizes, strides)
    assert (y[0, :2] == 0).all()
    assert (y[0, 2] == float("inf")).all()


def test_half_a_batch_draws_its_half_of_the_masks():
    sizes, strides = (1, 6, 1, 11), (0, 0, 1)
    x, rate, step = (
        torch.ones(sizes, device=DEVICE),
        torch.full((6,), 0.5, device=DEVICE),
        torch.tensor(1, device=DEVICE),
    )
    whole = dropout(x, rate, step, 3, 1, 0, sizes, strides)
    half = dropout(x[:, 4:].contiguous(), rate[4:], step, 3, 1, 4, (1, 2, 1, 11), strides)
    assert torch.equal(whole[:, 4:], half)


def test_an_empty_batch_is_empty():
    x = torch.ones(1, 0, 1, 5, device=DEVICE)
    assert dropout(x, x.new_ones(0), torch.tensor(0, device=DEVICE), 0, 1, 0, (1, 0, 1, 5), (0, 0, 1)).shape == x.shape


def test_float64_is_refused():
    x = torch.ones(1, 2, 1, 5, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"dropout: .* x is float64"):
        dropout(x, torch.ones(2, device=DEVICE), torch.tensor(0, device=DEVICE), 0, 1, 0, (1, 2, 1, 5), (0, 0, 1))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((1, 1, 2**15, 2**16), (0, 2**16, 1)),
        ((1, 1, 2**15, 2**16), (0, 0, 0)),
        ((1, 1, 1, 2**31), (0, 0, 2)),
    ],
    ids=["aligned", "shared", "strided"],
)
def test_rows_of_more_columns_than_32_bits_count_are_refused(sizes, strides):
    x, rate = torch.empty(sizes, device="meta"), torch.empty(1, device="meta")
    with pytest.raises(ValueError, match=rf"in one row; got {2**31}"):
        dropout(x, rate, torch.tensor(0), 0, 1, 0, sizes, strides)


def test_the_longest_rows_have_columns_of_32_bits_in_every_tile():
    view = tiles.Rows(1, 1, 1, tiles.MAX_COLUMNS, 0, 0, 1, tiles.SHIFTED)
    assert view.column_tiles(view.tile()) * view.tile().kwargs["COLS"] <= 2**31
