"""augment against its definition in plain torch: every effect, every way through the kernels, every decision."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast import random
from stn_fast.kernels import augment as kernels
from stn_fast.ops.augment import STRENGTHS, draw, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAW = dict(seed=2**40 + 3, stream=5, first_example=7)
STEP = 4
# Up to these strengths. None is a round number of 255ths, so nothing but a decision makes an exact 0.
MOST = dict(
    brightness=0.53, contrast=0.6, saturation=0.71, hue=0.5, input_scale=0.4, input_noise=0.3, rotation=200.0,
    translation=0.21, scale=0.5, shear=30.0, cutout_length=5.0, cutout_holes=4.0, input_dropout=0.4,
)  # fmt: skip
COLOURS_ONLY = ("saturation", "hue")
MEAN, STD = (0.4914, 0.4822, 0.4466), (0.247, 0.2435, 0.2616)


def images(*shape):
    """Blurred, as photographs are: white noise would show the last bit of a coordinate."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(*shape[:2], -(-shape[2] // 4) + 1, -(-shape[3] // 4) + 1, generator=generator)
    return (255 * torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")).round().to(torch.uint8)


def strengths(names, batch):
    generator = torch.Generator().manual_seed(1)
    drawn = {name: MOST[name] * torch.rand(batch, generator=generator).add(0.3).clamp_max(1) for name in names}
    return {name: value.floor() if name.startswith("cutout") else value for name, value in drawn.items()}


def bits(names):
    return sum(1 << k for k, name in enumerate(STRENGTHS) if name in names)


def launched(x, on, flip=0.0, crop_padding=0, **changes):
    batch, channels = x.shape[:2]
    table = torch.stack([on.get(name, torch.full((batch,), float("nan"))) for name in STRENGTHS])
    step = torch.tensor(STEP, device=DEVICE)
    options = dict(step=step, flip=flip, crop_padding=crop_padding, **DRAW) | changes
    mean, std = MEAN[:channels], STD[:channels]
    return kernels.augment(x.to(DEVICE), table.to(DEVICE), bits(on), mean, std, **options).cpu()


def defined(x, on, dtype, flip=0.0, crop_padding=0):
    draws = draw(x, bits(on), torch.tensor(STEP), **DRAW)
    channels = x.shape[1]
    return reference(x, on, draws, MEAN[:channels], STD[:channels], flip, crop_padding, dtype)


def assert_as_defined(x, on, *geometry):
    got = launched(x, on, *geometry)
    plain, exact = (defined(x, on, dtype, *geometry) for dtype in (torch.float32, torch.float64))
    assert_twice_as_good(got, plain, exact)
    if on.keys() & {"input_dropout", "cutout_holes"}:
        assert torch.equal(got == 0, plain == 0)
    return got


ALONE = [(name,) for name in STRENGTHS if not name.startswith("cutout")] + [("cutout_length", "cutout_holes")]


@pytest.mark.parametrize("size", [(8, 9), (7, 5)], ids=["four values share a counter", "odd"])
@pytest.mark.parametrize("names", ALONE, ids="+".join)
def test_an_effect_alone_is_as_defined(names, size):
    x = images(3, 3, *size)
    got = assert_as_defined(x, strengths(names, 3))
    assert not torch.equal(got, launched(x, {}))


@pytest.mark.parametrize(
    "shape", [(3, 3, 12, 16), (2, 3, 5, 7), (2, 1, 14, 14), (2, 1, 3, 3), (1, 3, 1, 1), (1, 1, 1, 6), (1, 3, 37, 29)]
)
def test_all_effects_together_are_as_defined(shape):
    names = STRENGTHS if shape[1] == 3 else [name for name in STRENGTHS if name not in COLOURS_ONLY]
    assert_as_defined(images(*shape), strengths(names, shape[0]), 0.5, min(2, *shape[2:]))


def test_images_of_several_tiles_are_as_defined(monkeypatch):
    monkeypatch.setattr(kernels, "TILES", kernels.TILES[:1])
    for shape in [(2, 3, 9, 11), (2, 1, 16, 12)]:
        names = STRENGTHS if shape[1] == 3 else [name for name in STRENGTHS if name not in COLOURS_ONLY]
        assert_as_defined(images(*shape), strengths(names, 2), 0.5, 2)


def test_an_image_that_needs_the_largest_tile_twice_is_as_defined():
    assert_as_defined(images(1, 3, 33, 32), strengths(["brightness", "contrast", "rotation", "input_noise"], 1))


def test_nothing_on_only_normalises():
    x = images(2, 3, 5, 6)
    column = [-1, 1, 1]
    want = (x.double() / 255 - torch.tensor(MEAN).double().view(column)) / torch.tensor(STD).double().view(column)
    assert_twice_as_good(launched(x, {}), want.float(), want)


def test_flip_and_crop_copy_the_pixels_that_their_numbers_name():
    batch, height, width, padding = 12, 6, 5, 2
    x = images(batch, 1, height, width)
    uniform = random.uniform(step=STEP, examples=batch, elements=3, **DRAW)
    want = torch.zeros(batch, height, width)
    for b, (u_flip, u_x, u_y) in enumerate(uniform):
        shift_x, shift_y = (int(u * (2 * padding + 1)) - padding for u in (u_x, u_y))
        for y in range(height):
            for column in range(width):
                source_x, source_y = column + shift_x, y + shift_y
                source_x = width - 1 - source_x if u_flip < 0.5 else source_x
                if 0 <= source_x < width and 0 <= source_y < height:
                    want[b, y, column] = x[b, 0, source_y, source_x]
    pixels = 255 * (launched(x, {}, 0.5, padding)[:, 0] * STD[0] + MEAN[0])
    assert torch.equal(pixels.round(), want)
    assert len({tuple(row) for row in (uniform < 0.5).tolist()}) > 4


def test_half_a_batch_draws_its_half():
    x, on = images(6, 3, 6, 6), strengths(STRENGTHS, 6)
    whole = launched(x, on, 0.5, 1)
    second = launched(x[4:], {name: value[4:] for name, value in on.items()}, 0.5, 1, first_example=11)
    assert torch.equal(whole[4:], second)


def test_what_an_image_draws_does_not_depend_on_what_else_is_on():
    """Crops, holes and dropped pixels stay where they were when another effect joins."""
    x = images(4, 3, 8, 8)
    some = strengths(["cutout_length", "cutout_holes", "input_dropout"], 4)
    more = some | strengths(["brightness", "input_noise"], 4)
    assert torch.equal(launched(x, some) == 0, launched(x, more) == 0)


def test_more_holes_than_have_numbers_are_the_most_there_can_be():
    x = images(2, 1, 9, 9)
    many, most = (dict(cutout_length=torch.ones(2), cutout_holes=torch.full((2,), float(n))) for n in (1000, 24))
    assert torch.equal(launched(x, many), launched(x, most))


@pytest.mark.parametrize("name", ["rotation", "translation", "scale", "input_noise"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_strengths_that_are_no_strengths_read_nothing_outside_of_the_image(name, value):
    """They can't be looked at on CUDA; an address outside of the images would end the process."""
    on = {name: torch.tensor([value, MOST[name]])}
    x = images(2, 1, 6, 6)
    assert torch.equal(launched(x, on)[1], launched(x, {name: torch.full((2,), MOST[name])})[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_extreme_strengths_stay_finite():
    most = dict(translation=3e38, scale=3e38, rotation=1e30, shear=89.999, contrast=1e6)
    got = launched(images(4, 3, 8, 8), {name: torch.full((4,), value) for name, value in most.items()})
    assert got.isfinite().all()


def test_an_empty_batch_is_empty():
    assert launched(images(2, 3, 4, 4)[:0], {}).shape == (0, 3, 4, 4)


def test_images_of_more_values_than_32_bits_number_are_refused():
    x = torch.empty(1, 3, 2**15, 2**15, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match=rf"at most {kernels.MAX_VALUES} values fit; got {3 * 2**30} in images"):
        kernels.augment(x, torch.empty(13, 1), 0, MEAN, STD, 0, torch.tensor(0), 1, 0, 0.0, 0)
