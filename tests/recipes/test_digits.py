"""The recipes on scikit-learn's digits, and the benchmark's even split of the small one."""

import torch

from benchmarks import even_split
from stn_fast.data import digits
from stn_fast.recipes import recipe


def test_the_small_recipe_trains_on_a_tenth_and_tunes_and_tests_on_all():
    small, whole = recipe("digits-small"), digits.load()
    task = small.build(small.config())
    assert [len(split.targets) for split in task.data] == [90, 400, 497]
    assert torch.equal(task.data.valid.inputs, whole.valid.inputs)
    assert torch.equal(task.data.test.inputs, whole.test.inputs)
    whole_rows = {row.numpy().tobytes() for row in whole.train.inputs}
    assert all(row.numpy().tobytes() in whole_rows for row in task.data.train.inputs)


def test_the_even_split_has_the_same_images_in_halves():
    small = recipe("digits-small").build(recipe("digits-small").config()).data
    even = even_split.build(even_split.config()).data
    assert [len(split.targets) for split in even] == [245, 245, 497]
    pooled, divided = (
        sorted((row.numpy().tobytes(), int(target)) for split in two for row, target in zip(*split, strict=True))
        for two in ((small.train, small.valid), (even.train, even.valid))
    )
    assert pooled == divided
    assert torch.equal(even.test.inputs, small.test.inputs)
