"""augment: the C++ core against the reference, colours and rotation against Pillow, bad input by its message."""

import pytest
import torch

from stn_fast.ops.augment import STRENGTHS, augment

WHERE = dict(seed=11, step=4, stream=2)
GREY, COLOUR = dict(mean=[0.3], std=[0.35]), dict(mean=[0.49, 0.48, 0.45], std=[0.25, 0.24, 0.26])


def images(batch=4, channels=3, height=8, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def full(value, batch=4):
    return torch.full((batch,), float(value))


X = images()


@pytest.mark.parametrize(
    ("x", "strengths", "change", "message"),
    [
        (X.float() / 255, {}, {}, r"uint8 images; got torch.float32; floats in \[0, 1\] become bytes by"),
        (X.int(), {}, {}, r"uint8 images; got torch.int32$"),
        (X[0], {}, {}, r"\(N, C, H, W\) with C = 1 or 3; got \(3, 8, 9\)"),
        (X[:, :2], {}, {}, r"with C = 1 or 3; got \(4, 2, 8, 9\)$"),
        (X.permute(0, 2, 3, 1), {}, {}, r"got \(4, 8, 9, 3\); permute"),
        (X, dict(brightnes=full(0)), {}, r"no strength 'brightnes'; did you mean 'brightness'"),
        (X, dict(hue=full(0, 5)), {}, r"hue \(4,\) float32.*got \(5,\)"),
        (X, dict(hue=full(0).double()), {}, r"hue \(4,\) float32.*got \(4,\) torch.float64"),
        (X, dict(hue=full(0).to("meta")), {}, r"float32 on cpu.*on meta"),
        (X, dict(hue=full(0).requires_grad_()), {}, r"hue requires grad.*hue.detach\(\)"),
        (X[:, :1], dict(hue=full(0)), GREY, r"hue wants images of 3 channels"),
        (X[:, :1], dict(saturation=full(0)), GREY, r"saturation wants images of 3 channels"),
        (X, dict(cutout_length=full(3)), {}, r"'cutout_length' without 'cutout_holes'"),
        (X, dict(cutout_holes=full(3)), {}, r"'cutout_holes' without 'cutout_length'"),
        (X, {}, GREY, r"mean of 3 finite numbers.*got \[0.3\]"),
        (X, {}, dict(std=[0.1]), r"std of 3 finite numbers.*got \[0.1\]"),
        (X, {}, dict(std=[0.1, 0.0, 0.1]), r"std > 0 for every channel; got \[0.1, 0.0, 0.1\]"),
        (X, {}, dict(mean=[0.1, float("nan"), 0.1]), r"mean of 3 finite numbers"),
        (X, {}, dict(flip=1.5), r"flip in \[0, 1\].*got 1.5"),
        (X, {}, dict(flip=float("nan")), r"flip in \[0, 1\].*got nan"),
        (X, {}, dict(crop_padding=-1), r"crop_padding from 0 to the side of the images, 8; got -1"),
        (X, {}, dict(crop_padding=9), r"crop_padding from 0 to the side of the images, 8; got 9"),
        (X, {}, dict(crop_padding=0.5), r"an int crop_padding.*got 0.5"),
        (X, {}, dict(stream=0), r"1 <= stream"),
        (X, {}, dict(seed=-1), r"0 <= seed"),
        (X, {}, dict(step=-1), r"step >= 0, or a tensor; got -1"),
        (X, {}, dict(first_example=-1), r"first_example >= 0; got -1"),
    ],
)
def test_misfits_are_named(x, strengths, change, message):
    with pytest.raises(ValueError, match=message):
        augment(x, strengths, **(WHERE | COLOUR | change))


OUTSIDE = {name: [-0.01, float("nan"), float("inf")] for name in STRENGTHS}
OUTSIDE["hue"] += [0.51]
OUTSIDE["shear"] += [90]
OUTSIDE["cutout_length"] += [8.5, 9]
OUTSIDE["cutout_holes"] += [25]
OUTSIDE["input_dropout"] += [1]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_strengths_outside_of_their_domain_are_named(name, value):
    strengths = {name: full(0)}
    if name.startswith("cutout"):
        strengths = dict(cutout_length=full(0), cutout_holes=full(0))
    strengths[name][2] = value
    with pytest.raises(ValueError, match=rf"augment wants {name} .*(>= 0|in \[0).*for every example; got {value:g}"):
        augment(X, strengths, **WHERE, **COLOUR)


def test_the_ends_of_a_closed_domain_are_allowed():
    strengths = dict(hue=full(0.5), cutout_length=full(8), cutout_holes=full(24))
    assert augment(X, strengths, **WHERE, **COLOUR).isfinite().all()
