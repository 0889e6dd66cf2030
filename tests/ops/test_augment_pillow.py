"""What augment computes, against Pillow and colorsys on real images.

Pillow works on bytes, so every tolerance is derived from where it rounds, in levels of 1/255. It truncates what it
blends or interpolates: the result lies in (exact − 1, exact].
"""

import colorsys
import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from stn_fast import random
from stn_fast.ops import augment as op
from stn_fast.ops.augment import augment

WHERE = dict(seed=5, step=6, stream=7)
PLAIN = {channels: dict(mean=[0.0] * channels, std=[1.0] * channels) for channels in (1, 3)}
LEVEL_ERROR = 0.01  # of float32 arithmetic, in levels: coordinates up to 161 are 2e-5 apart, colours differ by 255
COUNT = 20  # images of every stored data set


def photographs():
    """Parts of two photographs, large and small: [(2, 3, H, W) uint8]."""
    pictures = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    windows = (slice(200, 324), slice(250, 411)), (slice(200, 232), slice(300, 332)), (slice(100, 131), slice(50, 87))
    return [pictures[:, :, rows, columns].contiguous() for rows, columns in windows]


def stored():
    """Images of CIFAR-10 and Fashion-MNIST, where STN_FAST_DATA has them."""
    root, found = Path(os.environ.get("STN_FAST_DATA", "")), []
    batch, idx = root / "cifar10/cifar-10-batches-py/test_batch", root / "fashion_mnist/t10k-images-idx3-ubyte.gz"
    if batch.is_file():
        pixels = pickle.loads(batch.read_bytes(), encoding="bytes")[b"data"]
        found.append(torch.from_numpy(pixels[:COUNT].copy()).view(COUNT, 3, 32, 32))
    if idx.is_file():
        with gzip.open(idx) as file:
            pixels = np.frombuffer(file.read(16 + COUNT * 784), np.uint8, offset=16)
        found.append(torch.from_numpy(pixels.copy()).view(COUNT, 1, 28, 28))
    return found


@pytest.fixture(scope="module")
def real_images():
    return photographs() + stored()


def uniforms(batch):
    """(batch, 64), as the examples of a call draw them."""
    return random.uniform(5, 6, 7, batch, 64).astype(np.float64)


def jitter(batch, draw):
    return 2 * uniforms(batch)[:, draw] - 1


def picture_of(image):
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def levels_of(picture):
    """(C, H, W) float64."""
    array = np.asarray(picture, np.float64)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def augmented(images, backend, **strengths):
    """Unnormalised, in levels; a strength is one number for all."""
    strengths = {name: torch.full((len(images),), float(value), device=backend) for name, value in strengths.items()}
    got = augment(images.to(backend), strengths, **WHERE, **PLAIN[images.shape[1]])
    return 255 * got.cpu().double().numpy()


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    from stn_fast.dispatch import use_backend

    with use_backend(request.param):
        yield "cpu"


ENHANCERS = {
    "brightness": (ImageEnhance.Brightness, op.BRIGHTNESS),
    "contrast": (ImageEnhance.Contrast, op.CONTRAST),
    "saturation": (ImageEnhance.Color, op.SATURATION),
}


@pytest.mark.parametrize("name", ENHANCERS)
@pytest.mark.parametrize("strength", [0.4, 1.0, 3.0])
def test_enhancements_are_those_of_pillow(backend, real_images, name, strength):
    enhancer, draw = ENHANCERS[name]
    for images in real_images:
        if name == "saturation" and images.shape[1] == 1:
            continue
        got = augmented(images, backend, **{name: strength})
        for image, one, change in zip(images, got, jitter(len(images), draw), strict=True):
            factor = max(0.0, 1 + strength * change)
            pillow = levels_of(enhancer(picture_of(image)).enhance(factor))
            # Pillow blends with black, with the mean grey of the picture rounded twice (each pixel's and the mean, half
            # a level each), or with the pixel's grey rounded once. A blend weighs grey by 1 − factor and truncates.
            rounded = {"brightness": 0.0, "contrast": 1.0, "saturation": 0.5}[name] + 0.01
            tolerance = abs(1 - factor) * rounded + LEVEL_ERROR
            assert (one - pillow).min() > -tolerance
            assert (one - pillow).max() < 1 + tolerance


@pytest.mark.parametrize("strength", [0.05, 0.5])
def test_hue_is_that_of_pillow(backend, real_images, strength):
    for images in real_images:
        if images.shape[1] == 1:
            continue
        got = augmented(images, backend, hue=strength)
        for image, one, change in zip(images, got, jitter(len(images), op.HUE), strict=True):
            hsv = np.array(picture_of(image).convert("HSV"))
            # A byte of Pillow's hue is 1/255 of a turn, and 255 is where 0 is.
            steps = round(255 * strength * change)
            rest = 255 * strength * change - steps
            hsv[..., 0] = (hsv[..., 0].astype(int) + steps) % 255
            pillow = levels_of(Image.fromarray(hsv, "HSV").convert("RGB"))
            chroma = levels_of(picture_of(image)).max(0) - levels_of(picture_of(image)).min(0)
            # Of a turn, a channel changes by at most six times the chroma. The hue is truncated to 1/255, and here
            # `rest` of a step is left out. The saturation is truncated to 1/255: of value times that, a level at most.
            # What comes back is rounded, half a level.
            tolerance = 6 * chroma * (1 + abs(rest)) / 255 + 1.5 + LEVEL_ERROR
            assert (np.abs(one - pillow) < tolerance).all()


def test_hue_is_that_of_colorsys_exactly(backend):
    corners = [[r, g, b] for r in (0, 100, 255) for g in (0, 100, 255) for b in (0, 100, 255)]
    colours = np.concatenate([corners, np.random.default_rng(0).integers(0, 256, (200, 3))]).astype(np.uint8)
    images = torch.from_numpy(colours.T.copy()).view(1, 3, 1, -1).expand(6, -1, -1, -1).contiguous()
    got = augmented(images, backend, hue=0.5) / 255
    for one, change in zip(got, jitter(6, op.HUE), strict=True):
        for colour, turned in zip(colours / 255, one[:, 0].T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            want = colorsys.hsv_to_rgb((hue + 0.5 * change) % 1.0, saturation, value)
            np.testing.assert_allclose(turned, want, atol=2e-6)


def coefficients(width, height, u, rotation=0.0, translation=0.0, scale=0.0, shear=0.0, padding=0, mirrored=False):
    """Output to source, in pixel centres: (3, 3), by inverting the forward map that the documentation states."""
    centre = np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1]])
    angle, slope = np.deg2rad((2 * u[op.ROTATION] - 1) * rotation), np.tan(np.deg2rad((2 * u[op.SHEAR] - 1) * shear))
    turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    zoom = np.diag([(1 + scale) ** (2 * u[op.ZOOM] - 1)] * 2 + [1])
    slant = np.array([[1, slope, 0], [0, 1, 0], [0, 0, 1]])
    x, y = (2 * u[op.SHIFT_X] - 1) * translation * width, (2 * u[op.SHIFT_Y] - 1) * translation * height
    shift = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
    forward = shift @ centre @ turn @ zoom @ slant @ np.linalg.inv(centre)
    crop = np.array(
        [
            [1, 0, int(u[op.CROP_X] * (2 * padding + 1)) - padding],
            [0, 1, int(u[op.CROP_Y] * (2 * padding + 1)) - padding],
            [0, 0, 1],
        ]
    )
    mirror = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if mirrored else np.eye(3)
    return mirror @ crop @ np.linalg.inv(forward)


def sources(matrix, width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return [row[0] * x + row[1] * y + row[2] for row in matrix[:2]]


def compare_with_pillow(image, one, matrix, pillow):
    """Pillow repeats the border pixel for half a pixel, here it fades to black: so the inside and the outside."""
    _, height, width = image.shape
    x, y = sources(matrix, width, height)
    inside = (x > 0.01) & (x < width - 1.01) & (y > 0.01) & (y < height - 1.01)
    outside = (x < -1.01) | (x > width + 0.01) | (y < -1.01) | (y > height + 0.01)
    difference = (one - levels_of(pillow))[:, inside]
    assert difference.size > 0.1 * one.size
    assert difference.min() > -LEVEL_ERROR
    assert difference.max() < 1 + LEVEL_ERROR
    assert (one[:, outside] == 0).all()


@pytest.mark.parametrize("degrees", [10, 180])
def test_rotation_is_that_of_pillow(backend, real_images, degrees):
    for images in real_images:
        got = augmented(images, backend, rotation=degrees)
        _, _, height, width = images.shape
        for image, one, u in zip(images, got, uniforms(len(images)), strict=True):
            angle = (2 * u[op.ROTATION] - 1) * degrees
            pillow = picture_of(image).rotate(angle, Image.Resampling.BILINEAR)
            compare_with_pillow(image, one, coefficients(width, height, u, rotation=degrees), pillow)


@pytest.mark.parametrize(
    "strengths",
    [
        dict(translation=0.2),
        dict(scale=0.5),
        dict(shear=30),
        dict(rotation=30, translation=0.1, scale=0.3, shear=20),
    ],
    ids=lambda strengths: "+".join(strengths),
)
@pytest.mark.parametrize("framed", [False, True], ids=["", "crop and flip"])
def test_affine_maps_are_those_of_pillow(backend, real_images, strengths, framed):
    for images in real_images:
        batch, channels, height, width = images.shape
        frame = dict(crop_padding=4, flip=0.5) if framed else {}
        tensors = {name: torch.full((batch,), float(value)) for name, value in strengths.items()}
        got = 255 * augment(images, tensors, **WHERE, **PLAIN[channels], **frame).double().numpy()
        for image, one, u in zip(images, got, uniforms(batch), strict=True):
            mirrored = framed and u[op.FLIP] < 0.5
            matrix = coefficients(width, height, u, **strengths, padding=4 if framed else 0, mirrored=mirrored)
            # Pillow counts from the corner of the corner pixel.
            half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
            pillow = picture_of(image).transform(
                (width, height),
                Image.Transform.AFFINE,
                tuple((half @ matrix @ np.linalg.inv(half))[:2].flatten()),
                Image.Resampling.BILINEAR,
            )
            compare_with_pillow(image, one, matrix, pillow)
