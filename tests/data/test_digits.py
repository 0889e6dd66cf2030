"""The digits: fixed, disjoint, scaled splits; and what every data set must pass."""

import numpy as np
import pytest
import sklearn.datasets
import torch

from stn_fast.data import DataSet, Split, checked, digits
from stn_fast.errors import UserError


def test_the_splits_partition_the_digits_the_same_way_every_time():
    data = digits.load()
    assert [len(split.inputs) for split in data] == [900, 400, 497]
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)

    def multiset(inputs, targets):
        return sorted(map(tuple, np.column_stack([inputs, targets]).tolist()))

    ours = [torch.cat(parts) for parts in zip(*data, strict=True)]
    assert multiset(ours[0].numpy() * 16, ours[1].numpy()) == multiset(pixels, labels)
    assert torch.equal(digits.load().train.inputs, data.train.inputs)


def test_pixels_lie_between_0_and_1():
    inputs = digits.load().train.inputs
    assert inputs.dtype == torch.float32
    assert (inputs.min(), inputs.max()) == (0, 1)


def good():
    return Split(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place(value):
    bad = good()
    bad.inputs[3, 1] = value
    with pytest.raises(UserError, match=rf"the valid split holds {value} in inputs\[3, 1\]: 1 of 8 values"):
        checked(DataSet(good(), bad, good()))


def test_an_empty_or_unmatched_split_is_named():
    with pytest.raises(UserError, match="the test split is empty"):
        checked(DataSet(good(), good(), Split(torch.zeros(0, 2), torch.zeros(0))))
    with pytest.raises(UserError, match="the train split has 4 inputs and 3 targets"):
        checked(DataSet(Split(torch.zeros(4, 2), torch.zeros(3)), good(), good()))


def test_good_data_pass_unchanged():
    data = DataSet(good(), good(), good())
    assert checked(data) is data
