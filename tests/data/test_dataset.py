"""Any map-style or iterable data set of images and labels becomes one tensor of bytes, or is refused by name."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

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
        (PIXELS[1] / np.float32(255), "example 1 .* holds float32 where uint8"),
        (torch.zeros(3, 5, 6), "example 1 .* holds torch.float32 where uint8"),
        (np.zeros((5, 6, 3), np.int64), "holds int64"),
        (np.zeros((3, 5, 6), np.uint8), r"has shape \(3, 5, 6\); it wants \(H, W, C\) with 1 or 3 channels"),
        (torch.zeros(5, 6, 3, dtype=torch.uint8), r"has shape \(5, 6, 3\); it wants \(C, H, W\) with 1 or 3 channels"),
        (np.zeros((5, 6, 4), np.uint8), r"has shape \(5, 6, 4\)"),
        (np.zeros((0, 6, 3), np.uint8), r"has shape \(0, 6, 3\)"),
        (np.zeros(5, np.uint8), r"has shape \(5,\)"),
        (
            np.zeros((5, 7, 3), np.uint8),
            r"has shape \(3, 5, 7\) and example 0 \(3, 5, 6\).*resize or crop",
        ),
        (np.zeros((5, 6), np.uint8), r"has shape \(1, 5, 6\) and example 0 \(3, 5, 6\)"),
        (Image.new("RGBA", (6, 5)), "is an image of mode RGBA; it wants L or RGB"),
        (Image.new("P", (6, 5)), "mode P"),
        ("cat.png", "example 1 .* holds <U7"),
    ],
)
def test_an_image_of_another_kind_is_refused_by_name(image, says):
    with pytest.raises(UserError, match=says):
        from_dataset(Listed([PIXELS[0], image], LABELS))


@pytest.mark.parametrize("label", [-1, 1.0, "cat", None, torch.tensor([1, 2])])
def test_a_label_that_is_no_class_is_refused_by_name(label):
    with pytest.raises(UserError, match="example 1 of the data set has the label"):
        from_dataset(Listed(PIXELS, [0, label, 0, 0]))


def test_an_example_that_is_no_pair_is_refused_by_name():
    with pytest.raises(UserError, match="example 0 of the data set is no pair of an image and a label but Tensor"):
        from_dataset([torch.zeros(3, 5, 6, dtype=torch.uint8)])


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="is empty"):
        from_dataset(Listed([], []))
