"""Cutting a data set: disjoint, complete, fixed by the seed, and within its bounds."""

import pytest
import torch

from stn_fast.data import Split, fraction, split_validation
from stn_fast.errors import UserError


def numbered(count):
    return Split(torch.arange(count), torch.arange(count) * 2)


def test_validation_and_training_examples_are_a_partition():
    train, valid = split_validation(numbered(100), 30, seed=0)
    assert (len(train.inputs), len(valid.inputs)) == (70, 30)
    assert sorted([*train.inputs.tolist(), *valid.inputs.tolist()]) == list(range(100))
    for split in (train, valid):
        assert torch.equal(split.targets, split.inputs * 2)
    assert valid.inputs.tolist() != list(range(30))


def test_the_seed_fixes_the_split():
    def chosen(seed):
        return split_validation(numbered(100), 30, seed)[1].inputs.tolist()

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


@pytest.mark.parametrize("size", [0, -1, 10, 11])
def test_a_validation_size_that_leaves_nothing_is_refused(size):
    with pytest.raises(UserError, match=f"valid_size = {size}: must be at least 1 and leave some of the 10"):
        split_validation(numbered(10), size, seed=0)


def test_a_smaller_fraction_is_part_of_a_larger_one():
    small, large = (fraction(numbered(100), share, seed=0).inputs.tolist() for share in (0.2, 0.5))
    assert len(large) == len(set(large)) == 50
    assert small == large[:20]
    assert fraction(numbered(100), 0.2, seed=1).inputs.tolist() != small


def test_a_fraction_keeps_inputs_and_targets_together():
    got = fraction(numbered(100), 0.3, seed=0)
    assert torch.equal(got.targets, got.inputs * 2)


def test_fraction_1_is_the_split_itself_and_a_tiny_fraction_is_one_example():
    whole = numbered(10)
    assert fraction(whole, 1.0, seed=0) is whole
    assert len(fraction(whole, 1e-9, seed=0).inputs) == 1


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_out_of_bounds_is_refused(share):
    with pytest.raises(UserError, match=r"train_fraction \(--train-fraction\)"):
        fraction(numbered(10), share, seed=0)
