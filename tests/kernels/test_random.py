"""The generator: published answers, and the same numbers as the NumPy reference."""

import numpy as np
import pytest
import torch

from stn_fast import random as reference
from stn_fast.kernels import random as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONES = 0xFFFFFFFF
DRAWS = [
    # examples, elements, step, seed, stream, first_example
    (1, 1, 0, 0, 1, 0),
    (3, 7, 1, 1, 1, 1),
    (2, 1030, 2**31 + 5, 2**62 + 17, 3, 2**32 - 1),
]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    counters, keys = (torch.tensor([row] * 3, dtype=torch.uint32, device=DEVICE) for row in (counter, key))
    assert kernels.philox_bits(counters, keys).tolist() == [answer] * 3


def test_philox_agrees_with_the_reference_on_any_counter():
    words = np.random.default_rng(0).integers(0, 2**32, (300, 6), dtype=np.uint32)
    counters, keys = (torch.from_numpy(np.ascontiguousarray(part)).to(DEVICE) for part in (words[:, :4], words[:, 4:]))
    got = kernels.philox_bits(counters, keys).cpu().numpy()
    np.testing.assert_array_equal(got, reference.philox4x32(words[:, :4], words[:, 4:]))


def both(kind, examples, elements, step, seed, stream, first_example):
    on_device = torch.tensor(step, dtype=torch.int64, device=DEVICE)
    got = kernels.draw(kind, examples, elements, on_device, seed, stream, first_example)
    return got.cpu().numpy(), getattr(reference, kind)(seed, step, stream, examples, elements, first_example)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("kind", ["bits", "uniform"])
def test_draws_are_bit_for_bit_those_of_the_reference(kind, draw):
    np.testing.assert_array_equal(*both(kind, *draw))


@pytest.mark.parametrize("draw", [*DRAWS, (16, 4096, 3, 5, 7, 11)])
def test_normals_are_within_a_few_ulp_of_the_reference(draw):
    got, want = both("normal", *draw)
    np.testing.assert_array_max_ulp(got, want, maxulp=8)


def test_more_elements_than_a_grid_counts_are_refused():
    with pytest.raises(ValueError, match=rf"got elements={2**31}"):
        kernels.draw("bits", 1, 2**31, torch.tensor(0, device="meta"), 0, 1)
