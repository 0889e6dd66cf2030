"""Batches: every example once a pass, orders that differ between passes and repeat between runs."""

import pytest
import torch

from stn_fast.data import Split
from stn_fast.training.batches import Batches


def numbered(count):
    return Split(torch.arange(count), torch.arange(count) * 2)


def test_a_pass_gives_every_example_once():
    batches = Batches(numbered(12), 4, seed=0, stream=0)
    seen = torch.cat([batches[i].inputs for i in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


def test_inputs_and_targets_stay_together():
    batch = Batches(numbered(12), 4, seed=0, stream=0)[1]
    assert torch.equal(batch.targets, batch.inputs * 2)


def test_the_order_depends_on_pass_seed_and_stream_alone():
    def order(seed, stream, number):
        return Batches(numbered(50), 50, seed=seed, stream=stream)[number].inputs.tolist()

    assert order(0, 0, 3) == order(0, 0, 3)
    assert len({tuple(order(*key)) for key in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]}) == 4


def test_every_batch_has_the_same_size_when_a_pass_leaves_some_over():
    batches = Batches(numbered(10), 4, seed=0, stream=0)
    assert batches.per_pass == 2
    assert [len(batches[i].inputs) for i in range(5)] == [4] * 5


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_size_that_cannot_be_filled_is_refused(size):
    with pytest.raises(ValueError, match="batch_size wants 1 to 10"):
        Batches(numbered(10), size, seed=0, stream=0)
