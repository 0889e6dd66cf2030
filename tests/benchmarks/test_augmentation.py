"""What augment is timed against does the same job: fed the same numbers, it gives the same images."""

import numpy as np
import pytest
import torch

from benchmarks import augmentation
from benchmarks.cases import Case
from benchmarks.image_cases import augment_inputs
from stn_fast.ops import augment as op

BATCH, SIZE = 6, 24


@pytest.fixture
def job():
    """Images, strengths, the draws of stn_fast as the baselines take them, and what stn_fast makes of them."""
    torch.manual_seed(3)
    _, strengths = augment_inputs(
        Case("augment", "forward", (BATCH, 3, SIZE, SIZE), torch.float32, torch.device("cpu"))
    )
    # Smooth, so that what Pillow rounds between two stages moves no colour far.
    ramp = torch.linspace(40, 215, SIZE)
    images = torch.stack(
        [ramp.expand(SIZE, SIZE), ramp.view(-1, 1).expand(SIZE, SIZE), ramp.flip(0).expand(SIZE, SIZE)]
    )
    images = images.round().to(torch.uint8).expand(BATCH, -1, -1, -1).contiguous()
    draws = op.draw(images, 2**13 - 1, torch.tensor(2), seed=1, stream=3, first_example=0)
    in_order = augmentation.Draws(
        draws.head[:, :13],
        draws.head[:, op.HOLES : op.HOLES + 2 * augmentation.MOST_HOLES].view(BATCH, augmentation.MOST_HOLES, 2),
        draws.noise,
        draws.pixels,
    )
    want = op.augment(
        images, strengths, mean=augmentation.MEAN, std=augmentation.STD, seed=1, step=2, stream=3,
        flip=augmentation.FLIP, crop_padding=augmentation.CROP_PADDING,
    )  # fmt: skip
    return images, strengths, in_order, want


def test_batched_torch_operations_give_the_same_images(job):
    images, strengths, draws, want = job
    torch.testing.assert_close(augmentation.augment(images, strengths, draws), want, rtol=1e-4, atol=1e-3)


def test_pillow_and_numpy_give_the_same_images_to_bytes(job):
    images, strengths, draws, want = job
    for b in range(BATCH):
        one = augmentation.augment_image(
            images[b].permute(1, 2, 0).numpy(),
            {name: strength[b].item() for name, strength in strengths.items()},
            augmentation.Draws(*(numbers[b].numpy() for numbers in draws)),
        )
        difference = np.abs(one - want[b].numpy())
        # Five roundings of up to a level each, amplified by factors up to 1.5, the hue's by 6 levels at most; the
        # noise, the dropped pixels and the holes are the same numbers. The border is another matter: see compare_with_
        # pillow in test_augment_pillow.py.
        gain = 1.3 / 0.7 / min(augmentation.STD) / 255
        assert np.median(difference) < 4 * gain
        assert np.array_equal(one == 0, want[b].numpy() == 0)


def test_image_by_image_is_a_batch():
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    names = op.STRENGTHS
    got = augmentation.augment_image_by_image(images, np.zeros((3, 13), np.float32), names)
    assert got.shape == (3, 3, SIZE, SIZE)
    assert got.dtype == torch.float32
    # Without strengths there are crop and flip alone, and any colour of the middle is one of the image.
    levels = got * torch.tensor(augmentation.STD).view(3, 1, 1) + torch.tensor(augmentation.MEAN).view(3, 1, 1)
    assert ((255 * levels - (255 * levels).round()).abs() < 1e-3).all()
