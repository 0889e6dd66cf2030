"""augment: every backend against the definition in float64, what an example draws, and bad input by its message.

The definition itself is held against Pillow and colorsys in test_augment_pillow.py, and against counting here.
"""

import numpy as np
import pytest
import torch
from numerics import assert_twice_as_good, relative_error
from torch.autograd import forward_ad

from stn_fast import random
from stn_fast.dispatch import use_backend
from stn_fast.ops.augment import MOST_HOLES, STRENGTHS, augment, draw, reference

WHERE = dict(seed=11, step=4, stream=2)
GREY, COLOUR = dict(mean=[0.3], std=[0.35]), dict(mean=[0.49, 0.48, 0.45], std=[0.25, 0.24, 0.26])
PLAIN = dict(mean=[0, 0, 0], std=[1, 1, 1])
CROPPED = dict(flip=0.5, crop_padding=2)
# Large enough to reach every branch: factors clamped at 0, whole turns of the hue, holes over the border.
MOST = dict.fromkeys(STRENGTHS, 0.6) | dict(
    brightness=2.5, contrast=2.5, saturation=2.5, hue=0.5, rotation=200, shear=40, cutout_length=7, cutout_holes=4
)
COLOURED = ("saturation", "hue")


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request):
    """For what tests/kernels holds against the Triton kernel, whose interpreter is slow."""
    with use_backend(request.param):
        yield


def images(batch=4, channels=3, height=8, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def full(value, batch=4):
    return torch.full((batch,), float(value))


def some(names, batch, seed=1):
    """Strengths from 0 to MOST; cutout never lacks its partner."""
    names = {*names} | (
        {"cutout_length", "cutout_holes"} if any(name.startswith("cutout") for name in names) else set()
    )
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(batch, generator=generator) * MOST[name] for name in STRENGTHS if name in names}


def to(device, strengths):
    return {name: strength.to(device) for name, strength in strengths.items()}


def mask_of(strengths):
    return sum(1 << k for k, name in enumerate(STRENGTHS) if name in strengths)


def check(x, strengths, options, device="cpu", first_example=0):
    """The 2x rule, and pixels are dropped, cut out and left black exactly where the definition says so."""
    step, seed, stream = torch.tensor(WHERE["step"]), WHERE["seed"], WHERE["stream"]
    draws = draw(x, mask_of(strengths), step, seed, stream, first_example)
    exact = reference(x, strengths, draws, **options, dtype=torch.float64)
    plain = reference(x, strengths, draws, **options)
    got = augment(x.to(device), to(device, strengths), **WHERE, **options, first_example=first_example).cpu()
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert_twice_as_good(got, plain, exact)
    if "input_dropout" in strengths or "cutout_length" in strengths:
        assert torch.equal(got == 0, exact == 0)
        assert (got == 0).any()
    return got


SIZES = {
    "colour": (5, 3, 12, 12),
    "odd": (3, 3, 7, 13),
    "grey": (4, 1, 9, 9),
    "pixel": (3, 3, 1, 1),
    "row": (1, 1, 1, 70),
}


@pytest.mark.parametrize("name", [*STRENGTHS, "nothing"])
@pytest.mark.parametrize("size", ["colour", "odd", "grey"])
def test_each_strength_alone_is_the_definition(cpu_backend, name, size):
    batch, channels, height, width = SIZES[size]
    if channels == 1 and name in COLOURED:
        return
    strengths = some([name], batch)
    if "cutout_holes" in strengths:
        strengths["cutout_holes"] += 1
        strengths["cutout_length"] += 1
        strengths["cutout_length"].clamp_(max=min(height, width))
    x, statistics = images(batch, channels, height, width), COLOUR if channels == 3 else GREY
    for options in (statistics, statistics | CROPPED):
        check(x, strengths, options)


@pytest.mark.parametrize("size", SIZES)
def test_all_strengths_together_are_the_definition(backend, size):
    batch, channels, height, width = SIZES[size]
    strengths = some([name for name in STRENGTHS if channels == 3 or name not in COLOURED], batch)
    strengths["cutout_length"].clamp_(max=min(height, width))
    options = (COLOUR if channels == 3 else GREY) | dict(flip=0.5, crop_padding=min(2, height))
    x = images(batch, channels, height, width)
    if size in ("pixel", "row"):  # too few pixels for one of them to be dropped for sure
        strengths["input_dropout"][:] = 0.95
    check(x, strengths, options, backend)


@use_backend("cpp")
@pytest.mark.parametrize("shape", [(9, 3, 32, 32), (9, 1, 28, 28), (1, 3, 224, 224), (1, 3, 97, 131), (1, 1, 600, 2)])
def test_core_for_images_of_any_size(shape):
    batch, channels, height, width = shape
    strengths = some([name for name in STRENGTHS if channels == 3 or name not in COLOURED], batch)
    strengths["cutout_length"].clamp_(max=min(height, width))
    for without in ((), ("rotation", "translation", "scale", "shear"), ("input_noise",)):
        chosen = {name: strength for name, strength in strengths.items() if name not in without}
        check(images(*shape), chosen, (COLOUR if channels == 3 else GREY) | CROPPED, first_example=2**32 - 1)


def test_pixels_are_copied_exactly_without_geometry(cpu_backend):
    x = images(8)
    got = augment(x, {}, **WHERE, **PLAIN, flip=0.5, crop_padding=2)
    u = random.uniform(11, 4, 2, 8, 3)
    mirrored = u[:, 0] < 0.5
    assert 0 < mirrored.sum() < 8
    for image, one, draws, mirror in zip(x, got, u, mirrored, strict=True):
        padded = torch.nn.functional.pad(image.flip(-1) if mirror else image, (2, 2, 2, 2))
        right, down = int(draws[1] * 5), int(draws[2] * 5)
        assert torch.equal(one, padded[:, down : down + 8, right : right + 9] / 255)


@pytest.mark.parametrize("name", ["rotation", "translation", "scale", "shear"])
def test_a_geometry_of_strength_zero_copies_exactly_too(cpu_backend, name):
    x = images()
    got = augment(x, {name: full(0)}, **WHERE, **PLAIN, **CROPPED)
    assert torch.allclose(got, augment(x, {}, **WHERE, **PLAIN, **CROPPED), rtol=2e-7, atol=0)


def test_pixels_outside_of_the_image_are_black(cpu_backend):
    x = images().clamp(min=1)
    # Half the draws are ± 50 widths and more away.
    got = augment(x, dict(translation=full(100)), **WHERE, **PLAIN)
    u = torch.from_numpy(random.uniform(11, 4, 2, 4, 6))
    far = ((2 * u[:, 4:6] - 1).abs() * 100 > 1.2).any(1)
    assert far.any()
    assert (got[far] == 0).all()


def test_extreme_strengths_stay_finite(cpu_backend):
    strengths = dict(
        translation=full(3e38), scale=full(3e38), rotation=full(1e30), shear=full(89.999), contrast=full(1e6)
    )
    got = augment(images(), strengths, **WHERE, **PLAIN)
    assert got.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_halves_of_a_batch_are_augmented_as_the_whole(cpu_backend, channels):
    x, options = images(6, channels), (COLOUR if channels == 3 else GREY) | CROPPED
    strengths = some([name for name in STRENGTHS if channels == 3 or name not in COLOURED], 6)
    whole = augment(x, strengths, **WHERE, **options)
    for part in (slice(0, 2), slice(2, 6)):
        chosen = {name: strength[part] for name, strength in strengths.items()}
        got = augment(x[part], chosen, **WHERE, **options, first_example=part.start)
        assert torch.equal(got, whole[part])


def test_draws_depend_only_on_seed_step_stream_and_example():
    x, strengths = images(1).expand(2, -1, -1, -1), dict(input_noise=full(0.5, 2), rotation=full(20, 2))
    one = augment(x, strengths, **WHERE, **PLAIN)
    assert torch.equal(one, augment(x, strengths, **WHERE, **PLAIN))
    for change in (dict(seed=12), dict(step=5), dict(stream=3), dict(first_example=2)):
        assert (augment(x, strengths, **(WHERE | change), **PLAIN) != one).float().mean() > 0.9
    assert (one[0] != one[1]).float().mean() > 0.9


@use_backend("cpp")
@pytest.mark.parametrize("name", STRENGTHS)
def test_switching_a_strength_on_does_not_change_other_draws(name):
    """With a strength at 0 everything is as without it: elements are numbered whether or not an effect is on."""
    x, strengths = images(), some([other for other in STRENGTHS if other != name], 4)
    if name.startswith("cutout"):
        strengths = {other: s for other, s in strengths.items() if not other.startswith("cutout")}
    zeros = {other: full(0) for other in some([name], 4)}
    got = augment(x, strengths | zeros, **WHERE, **COLOUR, **CROPPED)
    torch.testing.assert_close(got, augment(x, strengths, **WHERE, **COLOUR, **CROPPED), rtol=1e-5, atol=1e-5)


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    x, strengths = images(33, height=31, width=17), some(STRENGTHS, 33)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            results.append(augment(x, strengths, **WHERE, **COLOUR, **CROPPED))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", [(0, 3, 8, 9), (2, 3, 0, 9), (2, 1, 8, 0)])
def test_empty_batches_and_images(backend, shape):
    strengths = dict(input_noise=torch.ones(shape[0], device=backend))
    got = augment(
        torch.zeros(shape, dtype=torch.uint8, device=backend), strengths, **WHERE, **(COLOUR if shape[1] == 3 else GREY)
    )
    assert got.shape == shape
    assert got.dtype == torch.float32


def test_images_of_any_layout(cpu_backend):
    x, strengths = images(4, 3, 8, 10), some(STRENGTHS, 4)
    want = augment(x, strengths, **WHERE, **COLOUR)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(4, 3, 16, 20, dtype=torch.uint8)
    wide[..., ::2, ::2] = x
    strided = {name: torch.stack([s, s], 1)[:, 0] for name, s in strengths.items()}
    for layout in (last, wide[..., ::2, ::2]):
        assert torch.equal(augment(layout, strided, **WHERE, **COLOUR), want)


@use_backend("cpp")
def test_torch_s_default_dtype_and_device_don_t_change_what_the_core_reads():
    x, strengths = images(), some(STRENGTHS, 4)
    want = augment(x, strengths, **WHERE, **COLOUR)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(augment(x, strengths, **WHERE, **COLOUR), want)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(augment(x, strengths, **WHERE, **COLOUR), want)


def test_step_as_tensor_is_the_step_as_int(cpu_backend):
    x, strengths = images(), some(STRENGTHS, 4)
    got = augment(x, strengths, **(WHERE | dict(step=torch.tensor(4))), **COLOUR)
    assert torch.equal(got, augment(x, strengths, **WHERE, **COLOUR))


def test_registration_is_complete(backend):
    table, step = torch.full((13, 4), 0.3, device=backend), torch.tensor(4, device=backend)
    arguments = (images().to(backend), table, step, 2**13 - 1, *COLOUR.values(), 11, 2, 0, 0.5, 2)
    torch.library.opcheck(torch.ops.stn_fast.augment.default, arguments)


def test_compiles_without_graph_break_to_the_same_numbers():
    x, strengths = images(), some(STRENGTHS, 4)
    compiled = torch.compile(lambda *t: augment(*t, **WHERE, **COLOUR), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, strengths), augment(x, strengths, **WHERE, **COLOUR))


def test_augmentation_is_a_constant_in_forward_mode_and_transforms():
    x, strengths, one = images(), some(STRENGTHS, 4), torch.ones(())
    want = augment(x, strengths, **WHERE, **COLOUR)
    _, tangent = torch.func.jvp(lambda w: w * augment(x, strengths, **WHERE, **COLOUR), (one,), (one,))
    assert relative_error(tangent, want) < 1e-5
    with forward_ad.dual_level():
        scaled = forward_ad.make_dual(one, one) * augment(x, strengths, **WHERE, **COLOUR)
        assert torch.equal(forward_ad.unpack_dual(scaled).tangent, want)
        strengths["hue"] = forward_ad.make_dual(full(0.1), full(1))
        with pytest.raises(ValueError, match=r"hue requires grad.*hue.detach\(\)"):
            augment(x, strengths, **WHERE, **COLOUR)


# What is drawn


def test_noise_is_normal_of_its_standard_deviation(cpu_backend):
    x, scale = torch.full((40, 3, 20, 20), 128, dtype=torch.uint8), torch.tensor([0.5, 2.0]).repeat(20)
    got = augment(x, dict(input_noise=scale), **WHERE, **PLAIN)
    z = (got - 128 / 255) / scale.view(-1, 1, 1, 1)
    # four standard errors of 48,000 draws
    assert abs(z.mean()) < 4 / 48_000**0.5
    assert abs(z.var() - 1) < 4 * (2 / 48_000) ** 0.5
    expected = random.normal(11, 4, 2, 40, 64 + 1200)[:, 64:]
    np.testing.assert_allclose(z.flatten(1).numpy(), expected, atol=2e-6)


def test_dropout_drops_whole_pixels_at_the_rate_and_keeps_the_mean(cpu_backend):
    x, rate = torch.full((40, 3, 31, 31), 255, dtype=torch.uint8), torch.tensor([0.0, 0.1, 0.5, 0.9]).repeat(10)
    got = augment(x, dict(input_dropout=rate), **WHERE, **PLAIN)
    kept = got[:, :1] != 0
    assert torch.equal((got != 0), kept.expand_as(got))
    torch.testing.assert_close(got, (kept / (1 - rate.view(-1, 1, 1, 1))).expand_as(got).float())
    for p in rate.unique():
        share = 1 - kept[rate == p].float().mean()
        assert abs(share - p) <= 4 * (p * (1 - p) / 9610) ** 0.5
    # element 64 + 2884 and on: noise has 3 · 31² = 2883 numbers, rounded up to whole counters
    u = torch.from_numpy(random.uniform(11, 4, 2, 40, 64 + 2884 + 961)[:, 64 + 2884 :]).view(40, 1, 31, 31)
    assert torch.equal(kept, u >= rate.view(-1, 1, 1, 1))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 21)])
def test_cutout_is_squares_at_uniform_centres_clipped_at_the_border(cpu_backend, height, width):
    length, count = torch.tensor([0, 1, 2, 5, 8.9, 9.0]), torch.tensor([3, 1, 24, 1.99, 2, 0.5])
    x = torch.full((6, 3, height, width), 255, dtype=torch.uint8)
    strengths = dict(cutout_length=length, cutout_holes=count)
    got = augment(x, strengths, **WHERE, **PLAIN)
    u = random.uniform(11, 4, 2, 6, 64)
    for b in range(6):
        want, side = torch.ones(3, height, width), int(length[b])
        for k in range(int(count[b])):
            left, top = int(u[b, 16 + 2 * k] * width) - side // 2, int(u[b, 17 + 2 * k] * height) - side // 2
            for row in range(max(top, 0), min(top + side, height)):
                for column in range(max(left, 0), min(left + side, width)):
                    want[:, row, column] = 0
        assert torch.equal(got[b], want)
    assert MOST_HOLES == 24


def test_input_scale_is_uniform_between_its_ends(cpu_backend):
    x, scale = torch.full((2000, 1, 1, 1), 255, dtype=torch.uint8), torch.full((2000,), 0.5)
    got = augment(x, dict(input_scale=scale), **WHERE, mean=[0.0], std=[1.0]).flatten()
    low, high = 1 / 1.5, 1.5
    assert got.min() >= low - 1e-6
    assert got.max() <= high + 1e-6
    assert abs(got.mean() - (low + high) / 2) < 4 * (high - low) / (12 * 2000) ** 0.5
    assert abs(got.var() - (high - low) ** 2 / 12) < 0.01


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_images_are_mirrored_at_the_flip_rate(cpu_backend, flip):
    x = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 1, 2)
    got = augment(x, {}, **WHERE, mean=[0.0], std=[1.0], flip=flip)
    share = (got[..., 0] == 1).float().mean()
    assert abs(share - flip) <= 4 * (flip * (1 - flip) / 1000) ** 0.5


# Bad input

X = images()


@pytest.mark.parametrize(
    ("x", "strengths", "change", "message"),
    [
        (X.float() / 255, {}, {}, r"must be uint8, got torch.float32; convert floats in \[0, 1\] by"),
        (X.int(), {}, {}, r"must be uint8, got torch.int32$"),
        (X[0], {}, {}, r"\(N, C, H, W\) with C = 1 or 3, got \(3, 8, 9\)"),
        (X[:, :2], {}, {}, r"with C = 1 or 3, got \(4, 2, 8, 9\)$"),
        (X.permute(0, 2, 3, 1), {}, {}, r"got \(4, 8, 9, 3\); permute"),
        (X.new_zeros(0, 3, 2**14 + 1, 9), {}, {}, r"at most 16384 rows and columns, got"),
        (X, dict(brightnes=full(0)), {}, r"no strength 'brightnes'; did you mean 'brightness'"),
        (X, dict(hue=full(0, 5)), {}, r"hue must be \(4,\) float32.*got \(5,\)"),
        (X, dict(hue=full(0).double()), {}, r"hue must be \(4,\) float32.*got \(4,\) torch.float64"),
        (X, dict(hue=full(0).to("meta")), {}, r"float32 on cpu.*on meta"),
        (X, dict(hue=full(0).requires_grad_()), {}, r"hue requires grad.*hue.detach\(\)"),
        (X[:, :1], dict(hue=full(0)), GREY, r"hue needs images with 3 channels"),
        (X[:, :1], dict(saturation=full(0)), GREY, r"saturation needs images with 3 channels"),
        (X, dict(cutout_length=full(3)), {}, r"'cutout_length' without 'cutout_holes'"),
        (X, dict(cutout_holes=full(3)), {}, r"'cutout_holes' without 'cutout_length'"),
        (X, {}, GREY, r"mean must be 3 finite numbers.*got \[0.3\]"),
        (X, {}, dict(std=[0.1]), r"std must be 3 finite numbers.*got \[0.1\]"),
        (X, {}, dict(std=[0.1, 0.0, 0.1]), r"std must be > 0 for every channel, got \[0.1, 0.0, 0.1\]"),
        (X, {}, dict(mean=[0.1, float("nan"), 0.1]), r"mean must be 3 finite numbers"),
        (X, {}, dict(flip=1.5), r"flip, a probability, must be in \[0, 1\], got 1.5"),
        (X, {}, dict(flip=float("nan")), "flip must be a finite number, got nan"),
        (X.numpy(), {}, {}, r"images must be a tensor, got ndarray"),
        (X, dict(hue=0.1), {}, r"hue must be a tensor \(4,\) float32.*got 0.1"),
        (X, {}, dict(crop_padding=-1), r"crop_padding must be an int >= 0.*got -1"),
        (X, {}, dict(crop_padding=9), r"crop_padding must be from 0 to the side of the images, 8, got 9"),
        (X, {}, dict(crop_padding=0.5), r"crop_padding must be an int >= 0.*got 0.5"),
        (X, {}, dict(stream=0), r"stream must be an int >= 1 and < 2\*\*32"),
        (X, {}, dict(seed=-1), r"seed must be an int >= 0 and < 2\*\*63"),
        (X, {}, dict(step=-1), r"step must be an int >= 0.*or a 0-dim int64 tensor on cpu, got -1"),
        (X, {}, dict(first_example=-1), r"first_example must be an int >= 0.*got -1"),
        (X, {}, dict(first_example=1.5), r"first_example must be an int >= 0.*got 1.5"),
    ],
)
def test_wrong_arguments_are_named_in_the_error(x, strengths, change, message):
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
    with pytest.raises(ValueError, match=rf"augment: {name} must be .*(>= 0|in \[0).*for every example, got {value:g}"):
        augment(X, strengths, **WHERE, **COLOUR)


def test_the_ends_of_a_closed_domain_are_allowed():
    strengths = dict(hue=full(0.5), cutout_length=full(8), cutout_holes=full(24))
    assert augment(X, strengths, **WHERE, **COLOUR).isfinite().all()
