"""Checksums tell tensors apart that differ in a single bit, or in the order of their numbers."""

import pytest
import torch

from stn_fast.training import checksums
from stn_fast.training.checksums import bits, checksum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_changes_with_any_number_and_with_their_order(dtype):
    numbers = (torch.arange(35).view(7, 5) % 3 - 1).to(dtype).t()
    before = checksum(numbers)
    assert checksum(numbers.contiguous()) == before
    for place in [(row, column) for row in range(5) for column in range(7)]:
        other = numbers.clone()
        other[place] = not other[place]
        assert not torch.equal(other, numbers)
        assert checksum(other) != before
    assert checksum(numbers.flip(1)) != before


def test_the_smallest_change_counts_and_so_do_two_that_cancel():
    numbers = torch.ones(9)
    up, down = (torch.nextafter(numbers[0], torch.tensor(end)) for end in (2.0, 0.0))
    one, two = numbers.clone(), numbers.clone()
    one[4], two[4], two[7] = up, up, down
    assert len({int(checksum(tensor)) for tensor in (numbers, one, two)}) == 3
    assert bits(one).tolist() == [0x3F800000 + (k == 4) for k in range(9)]


def test_checksums_of_large_tensors_are_those_of_their_pieces(monkeypatch):
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    before = checksum(numbers)
    monkeypatch.setattr(checksums, "_AT_ONCE", 64)
    assert checksum(numbers) == before
    assert checksum(torch.empty(0)) == 0
