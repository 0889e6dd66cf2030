"""Any map-style or iterable data set of images and labels becomes one tensor of bytes, or is refused by name."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stn_fast.data import from_dataset
from stn_fast.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
LABELS = [3, 0, 2, 1]


class Listed(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


class Streamed(IterableDataset):
    def __iter__(self):
        return zip(map(Image.fromarray, PIXELS), LABELS, strict=True)


@pytest.mark.parametrize(
    "dataset",
    [
        Listed(PIXELS, LABELS),
        Listed([Image.fromarray(array) for array in PIXELS], np.array(LABELS)),
        TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.tensor(LABELS)),
        Streamed(),
    ],
    ids=["arrays", "PIL", "tensors", "iterable"],
)
def test_colour_images_of_every_kind_become_the_same_tensor(dataset):
    inputs, targets = from_dataset(dataset)
    assert inputs.dtype == torch.uint8
    assert targets.dtype == torch.int64
    np.testing.assert_array_equal(inputs.numpy(), np.moveaxis(PIXELS, 3, 1))
    assert targets.tolist() == LABELS


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Image.fromarray, lambda grey: grey[:, :, None]])
def test_grey_images_have_one_channel(kind):
    grey = np.ascontiguousarray(PIXELS[..., 0])
    inputs, _ = from_dataset(Listed([kind(array) for array in grey], LABELS))
    np.testing.assert_array_equal(inputs.numpy(), grey[:, None])


def test_the_tensor_does_not_share_memory_with_the_data_set():
    images = PIXELS.copy()
    inputs, _ = from_dataset(Listed(images, LABELS))
    images[:] = 0
    assert inputs.any()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (PIXELS[1] / np.float32(255), "example 1 .* holds float32, but images must be uint8"),
        (torch.zeros(3, 5, 6), "example 1 .* holds torch.float32, but images must be uint8"),
        (np.zeros((5, 6, 3), np.int64), "holds int64"),
        (np.zeros((3, 5, 6), np.uint8), r"has shape \(3, 5, 6\); it must be \(H, W, C\) with 1 or 3 channels"),
        (
            torch.zeros(5, 6, 3, dtype=torch.uint8),
            r"has shape \(5, 6, 3\); it must be \(C, H, W\) with 1 or 3 channels",
        ),
        (np.zeros((5, 6, 4), np.uint8), r"has shape \(5, 6, 4\)"),
        (np.zeros((0, 6, 3), np.uint8), r"has shape \(0, 6, 3\)"),
        (np.zeros(5, np.uint8), r"has shape \(5,\)"),
        (
            np.zeros((5, 7, 3), np.uint8),
            r"has shape \(3, 5, 7\) and example 0 \(3, 5, 6\).*resize or crop",
        ),
        (np.zeros((5, 6), np.uint8), r"has shape \(1, 5, 6\) and example 0 \(3, 5, 6\)"),
        (Image.new("RGBA", (6, 5)), "is an image of mode RGBA; convert the image to L or RGB"),
        (Image.new("P", (6, 5)), "mode P"),
        ("cat.png", "example 1 .* holds <U7"),
    ],
)
def test_an_image_of_another_kind_is_refused_by_name(image, says):
    with pytest.raises(UserError, match=says):
        from_dataset(Listed([PIXELS[0], image], LABELS))


@pytest.mark.parametrize(
    "label",
    [-1, -(2**63) - 1, 1.0, np.float32(1), float("nan"), torch.tensor(1.0), "cat", "1", None, torch.tensor([1, 2])],
)
def test_a_label_that_is_no_class_is_refused_by_name(label):
    with pytest.raises(UserError, match="example 1 of the data set has the label"):
        from_dataset(Listed(PIXELS, [0, label, 0, 0]))


@pytest.mark.parametrize(
    "label", [2**63, 2**64, np.uint64(2**63), np.array(2**63, np.uint64), torch.tensor(2**63, dtype=torch.uint64)]
)
def test_a_label_that_int64_cannot_hold_is_refused_by_name(label):
    with pytest.raises(UserError, match=r"example 1 .* has the label .*\d{19}.*2\*\*63 - 1$"):
        from_dataset(Listed(PIXELS, [0, label, 0, 0]))


def test_the_largest_label_of_int64_is_kept():
    assert from_dataset(Listed(PIXELS, [0, 2**63 - 1, np.int64(1), torch.tensor(2)])).targets[1] == 2**63 - 1


@pytest.mark.parametrize("label", [np.zeros((40, 40)), torch.zeros(9, 9), "x\ny" * 99, list(range(999))])
def test_a_label_that_is_long_to_show_stays_on_one_short_line(label):
    with pytest.raises(UserError, match="example 1 of the data set has the label") as caught:
        from_dataset(Listed(PIXELS, [0, label, 0, 0]))
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("example", "kind"),
    [
        (torch.zeros(3, 5, 6, dtype=torch.uint8), "Tensor"),
        (torch.zeros(2, 5, 6, dtype=torch.uint8), "Tensor"),
        (np.zeros((2, 5, 6), np.uint8), "ndarray"),
        (np.array(1), "ndarray"),
        ({"image": PIXELS[0], "label": 0}, "dict"),
        ("ab", "str"),
        (None, "NoneType"),
        ((PIXELS[0], 0, 0), "tuple of length 3"),
        ([], "list of length 0"),
    ],
)
def test_an_example_that_is_no_pair_is_refused_by_name(example, kind):
    with pytest.raises(UserError, match=rf"example 1 of the data set must be a pair \(image, label\); it is a {kind}$"):
        from_dataset([(PIXELS[0], 0), example])


def test_a_list_whose_rows_differ_in_length_is_refused_by_name():
    with pytest.raises(UserError, match="example 1 of the data set has an image of type list that is no array"):
        from_dataset([(PIXELS[0], 0), ([[1, 2], [3]], 0)])


class WithoutLength(Dataset):
    def __getitem__(self, i):
        return PIXELS[i], LABELS[i]


class LengthOfAnother(WithoutLength):
    def __len__(self):
        return len(WithoutLength())


class LengthLeftOut(WithoutLength):
    def __len__(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "dataset",
    [WithoutLength(), LengthOfAnother(), LengthLeftOut(), zip(PIXELS, LABELS, strict=True), iter([]), None, 3],
    ids=lambda dataset: type(dataset).__name__,
)
def test_a_data_set_without_a_length_is_refused_by_its_type(dataset):
    says = f"the data set, of type {type(dataset).__name__}, has no len.*pass a list.*an IterableDataset"
    with pytest.raises(UserError, match=says):
        from_dataset(dataset)


@pytest.mark.parametrize("dataset", [DataLoader(Listed(PIXELS, LABELS)), {1, 2}, dict(enumerate(LABELS)).values()])
def test_a_data_set_that_cannot_be_indexed_is_refused_by_its_type(dataset):
    with pytest.raises(UserError, match=rf"of type {type(dataset).__name__}, cannot be indexed; pass a list"):
        from_dataset(dataset)


class Broken(Listed):
    def __getitem__(self, i):
        if i == 2:
            raise OSError("image file is truncated")
        return super().__getitem__(i)


class BrokenStream(IterableDataset):
    def __iter__(self):
        yield from zip(PIXELS[:2], LABELS, strict=False)
        raise OSError("image file is truncated")


class BrokenImage:
    def __array__(self, dtype=None, copy=None):
        raise OSError("image file is truncated")


@pytest.mark.parametrize(
    "dataset",
    [Broken(PIXELS, LABELS), BrokenStream(), Listed([*PIXELS[:2], BrokenImage(), PIXELS[3]], LABELS)],
    ids=["indexed", "iterable", "image"],
)
def test_an_error_of_the_data_set_s_own_stays_and_names_the_example(dataset):
    with pytest.raises(OSError, match="image file is truncated") as caught:
        from_dataset(dataset)
    assert str(caught.value) == "image file is truncated"
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["while reading example 2 of the data set"]


class TooLong(Listed):
    def __len__(self):
        return 9


def test_a_length_beyond_the_examples_names_the_first_that_is_missing():
    with pytest.raises(IndexError) as caught:
        from_dataset(TooLong(PIXELS, LABELS))
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["while reading example 4 of the data set"]


class EmptyStream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("dataset", [Listed([], []), [], EmptyStream()], ids=["indexed", "list", "iterable"])
def test_no_examples_are_refused(dataset):
    with pytest.raises(UserError, match="is empty"):
        from_dataset(dataset)
