"""noise against the formula, with normals from the NumPy generator."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast import random
from stn_fast.kernels.noise import noise_backward, noise_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (1, 5, 37), (3, 2, 7), (3, 4, 16), (2, 3, 1030), (5, 3, 1), (1, 130, 3)]
DRAW = dict(seed=2**40 + 3, stream=2, first_example=5)


def case(sizes, dtype):
    outer, batch, inner = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator).to(dtype)
    scale = torch.rand(batch, generator=generator) + 0.1
    normals = torch.from_numpy(
        random.normal(DRAW["seed"], 4, DRAW["stream"], batch, outer * inner, DRAW["first_example"])
    )
    return x, scale, normals.view(batch, outer, inner).transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_is_as_exact_as_plain_torch(sizes, dtype):
    x, scale, normals = case(sizes, dtype)
    got = noise_forward(x.to(DEVICE), scale.to(DEVICE), torch.tensor(4, device=DEVICE), **DRAW, sizes=sizes)
    noise = scale[:, None] * normals
    assert_twice_as_good(got, x + noise.to(dtype), x.double() + noise.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradient_of_the_scale_is_as_exact_as_plain_torch(sizes, dtype):
    dy, _, normals = case(sizes, dtype)
    got = noise_backward(dy.to(DEVICE), torch.tensor(4, device=DEVICE), **DRAW, sizes=sizes)
    assert got.dtype == torch.float32
    assert_twice_as_good(got, (dy.float() * normals).sum((0, 2)), (dy.double() * normals.double()).sum((0, 2)))


def test_an_empty_batch_has_an_empty_gradient():
    dy = torch.ones(2, 0, 3, device=DEVICE)
    assert noise_backward(dy, torch.tensor(4, device=DEVICE), **DRAW, sizes=(2, 0, 3)).shape == (0,)


def test_float64_is_refused():
    x, step = torch.ones(1, 2, 3, dtype=torch.float64, device=DEVICE), torch.tensor(4, device=DEVICE)
    with pytest.raises(TypeError, match=r"noise: .* x is float64"):
        noise_forward(x, torch.ones(2, device=DEVICE), step, **DRAW, sizes=(1, 2, 3))
    with pytest.raises(TypeError, match=r"noise: .* dy is float64"):
        noise_backward(x, step, **DRAW, sizes=(1, 2, 3))


def test_more_columns_than_32_bits_count_are_refused():
    sizes = (1, 1, 2**31)
    x, scale, step = torch.empty(sizes, device="meta"), torch.empty(1, device="meta"), torch.tensor(4)
    with pytest.raises(ValueError, match=rf"in one row; got {2**31}"):
        noise_forward(x, scale, step, **DRAW, sizes=sizes)
    with pytest.raises(ValueError, match=rf"in one row; got {2**31}"):
        noise_backward(x, step, **DRAW, sizes=sizes)
