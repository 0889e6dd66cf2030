"""augment: uint8 images to normalised floats, each example with its own strengths, drawn by a counter-based RNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stn_fast import random
from stn_fast.checks import real_number, whole_number
from stn_fast.dispatch import choose
from stn_fast.errors import did_you_mean
from stn_fast.ops.draw import check_coordinates, check_stream, check_strength, step_number
from stn_fast.ops.memory import address, own_address, reads_memory
from stn_fast.ops.transforms import in_function_transform, traced

# The rows of the table that kernels read, in this order; bit k of the mask is set if strength k is on.
STRENGTHS = (
    "brightness", "contrast", "saturation", "hue", "input_scale", "input_noise", "rotation", "translation", "scale",
    "shear", "cutout_length", "cutout_holes", "input_dropout",
)  # fmt: skip
MOST_HOLES = 24
LONGEST_SIDE = 2**14  # coordinates are float32, and pixels of an image are numbered in 32 bits

# The uniforms of an example by their use. Noise uses the elements from PIXEL_DRAWS on, one per value; dropout those
# after them, one per pixel, starting at a multiple of four.
FLIP, CROP_X, CROP_Y, ROTATION, SHIFT_X, SHIFT_Y, ZOOM, SHEAR, BRIGHTNESS, CONTRAST, SATURATION, HUE, GAIN = range(13)
HOLES = 16
PIXEL_DRAWS = HOLES + 2 * MOST_HOLES


class Domain(NamedTuple):
    """The values that a strength may have: from 0 to `end`, including `end` if `closed`."""

    end: float
    closed: bool

    def holds(self, least: float, most: float) -> bool:
        """Whether all values from `least` to `most` are allowed; NaN never is."""
        return least >= 0 and (most < self.end or (self.closed and most == self.end))

    def __str__(self) -> str:
        return "finite and >= 0" if self.end == math.inf else f"in [0, {self.end:g}{']' if self.closed else ')'}"


_DOMAINS = {name: Domain(math.inf, False) for name in STRENGTHS} | {
    "hue": Domain(0.5, True),
    "shear": Domain(90.0, False),
    "cutout_holes": Domain(MOST_HOLES, True),
    "input_dropout": Domain(1.0, False),
}


def domain(name: str, height: int, width: int) -> Domain:
    """The domain of the strength `name` for images of this size."""
    return Domain(min(height, width), True) if name == "cutout_length" else _DOMAINS[name]


class Draws(NamedTuple):
    """The random numbers of a batch, float32; None for those that no active strength needs."""

    head: Tensor  # (N, PIXEL_DRAWS) uniforms
    noise: Tensor | None  # (N, C, H, W) normals
    pixels: Tensor | None  # (N, 1, H, W) uniforms


def draw(images: Tensor, mask: int, step: Tensor, seed: int, stream: int, first_example: int) -> Draws:
    """The random numbers of `augment`, from the NumPy generator."""
    batch, channels, height, width = images.shape
    values, pixels = channels * height * width, height * width
    where = (seed, step_number("augment", step), stream, batch)

    def part(numbers: Callable[..., Any], first: int, count: int, *shape: int) -> Tensor:
        drawn = numbers(*where, first + count, first_example)[:, first:]
        return torch.from_numpy(drawn).to(images.device).view(batch, *shape)

    noise, dropped = (mask >> STRENGTHS.index(name) & 1 for name in ("input_noise", "input_dropout"))
    after_noise = PIXEL_DRAWS + 4 * -(-values // 4)
    return Draws(
        part(random.uniform, 0, PIXEL_DRAWS, PIXEL_DRAWS),
        part(random.normal, PIXEL_DRAWS, values, channels, height, width) if noise else None,
        part(random.uniform, after_noise, pixels, 1, height, width) if dropped else None,
    )


def reference(
    images: Tensor,
    strengths: Mapping[str, Tensor],
    draws: Draws,
    mean: Sequence[float],
    std: Sequence[float],
    flip: float = 0.0,
    crop_padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The definition, in plain torch: images (N, C, H, W) uint8 → (N, C, H, W) in `dtype`.

    Decisions (flip, crop, holes, dropped pixels) are made in float32 for every dtype, as in all backends.
    """
    _, _, height, width = images.shape
    s = {name: strength.to(dtype).view(-1, 1, 1, 1) for name, strength in strengths.items()}
    u = draws.head.view(*draws.head.shape, 1, 1, 1).unbind(1)  # u[k] is (N, 1, 1, 1)
    jitter = [(2 * draw - 1).to(dtype) for draw in u]  # in [−1, 1)

    sources = _sources(strengths, draws.head, height, width, flip, crop_padding)
    x = _sample(images.to(dtype), *(source.to(dtype) for source in sources)) / 255
    if "brightness" in s:
        x = (x * _factor(s["brightness"], jitter[BRIGHTNESS])).clamp(0, 1)
    if "contrast" in s:
        level = _grey(x).mean((-2, -1), keepdim=True)
        x = (level + _factor(s["contrast"], jitter[CONTRAST]) * (x - level)).clamp(0, 1)
    if "saturation" in s:
        grey = _grey(x)
        x = (grey + _factor(s["saturation"], jitter[SATURATION]) * (x - grey)).clamp(0, 1)
    if "hue" in s:
        x = _turn_hue(x, (jitter[HUE] * s["hue"])[:, 0]).clamp(0, 1)

    column = [-1, 1, 1]
    x = (x - x.new_tensor(mean).view(column)) / x.new_tensor(std).view(column)
    if "input_scale" in s:
        low, high = 1 / (1 + s["input_scale"]), 1 + s["input_scale"]
        x = x * (low + u[GAIN] * (high - low))
    if draws.noise is not None:
        x = x + s["input_noise"] * draws.noise
    if draws.pixels is not None:
        keep = draws.pixels >= strengths["input_dropout"].view(-1, 1, 1, 1)
        x = torch.where(keep, x / (1 - s["input_dropout"]), 0)
    if "cutout_length" in s:
        length, count = (strengths[name].floor().view(-1, 1, 1, 1) for name in ("cutout_length", "cutout_holes"))
        x = x.masked_fill(_holes(draws.head, length, count, height, width), 0)
    return x


def _sources(
    strengths: Mapping[str, Tensor], head: Tensor, height: int, width: int, flip: float, crop_padding: int
) -> tuple[Tensor, Tensor]:
    """The source point (x, y) of every output pixel, each (N, H, W) float64."""
    jitter = 2 * head.double() - 1

    def drawn(name: str, k: int) -> Tensor:
        strength = strengths.get(name)
        return torch.zeros_like(jitter[:, k]) if strength is None else jitter[:, k] * strength

    angle, slope = torch.deg2rad(drawn("rotation", ROTATION)), torch.deg2rad(drawn("shear", SHEAR)).tan()
    log_zoom = jitter[:, ZOOM] * strengths["scale"].double().log1p() if "scale" in strengths else drawn("scale", ZOOM)
    shift_x, shift_y = drawn("translation", SHIFT_X) * width, drawn("translation", SHIFT_Y) * height
    # Forward: rotate ∘ zoom ∘ shear. With y pointing down, [[cos, sin], [−sin, cos]] turns counter-clockwise.
    cosine, sine = angle.cos() * (-log_zoom).exp(), angle.sin() * (-log_zoom).exp()
    inverse = cosine - slope * sine, -sine - slope * cosine, sine, cosine
    xx, xy, yx, yy = (entry.view(-1, 1, 1) for entry in inverse)

    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x = torch.arange(width, device=head.device) - centre_x - shift_x.view(-1, 1, 1)
    y = torch.arange(height, device=head.device).view(-1, 1) - centre_y - shift_y.view(-1, 1, 1)
    crop_x, crop_y = (
        (head[:, k] * (2 * crop_padding + 1)).floor().view(-1, 1, 1) - crop_padding for k in (CROP_X, CROP_Y)
    )
    source_x, source_y = xx * x + xy * y + centre_x + crop_x, yx * x + yy * y + centre_y + crop_y
    source_x = torch.where((head[:, FLIP] < flip).view(-1, 1, 1), width - 1 - source_x, source_x)
    return source_x.clamp(-1, width), source_y.clamp(-1, height)  # black there and beyond


def _sample(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear interpolation of images (N, C, H, W) at points (x, y), (N, H, W) each; black outside."""
    _, channels, height, width = images.shape
    pixels, sampled = images.flatten(2), torch.zeros_like(images)
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = torch.where(inside, (1 - (y - row).abs()) * (1 - (x - column).abs()), 0)
            index = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            corner = pixels.gather(2, index.flatten(1)[:, None].expand(-1, channels, -1)).view_as(images)
            sampled = sampled + weight[:, None] * corner
    return sampled


def _factor(strength: Tensor, jitter: Tensor) -> Tensor:
    return (1 + jitter * strength).clamp_min(0)


def _grey(x: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    red, green, blue = x.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue in HSV; x (N, 3, H, W), turns (N, 1, 1)."""
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    divisor = torch.where(chroma > 0, chroma, 1)
    sixths = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(value == red, (green - blue) / divisor, sixths) + 6 * turns

    def channel(offset: int) -> Tensor:
        k = (sixths + offset) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], dim=1)


def _holes(head: Tensor, length: Tensor, count: Tensor, height: int, width: int) -> Tensor:
    """Which pixels are cut out, (N, 1, H, W) bool."""
    rows = torch.arange(height, device=head.device).view(-1, 1)
    columns = torch.arange(width, device=head.device)
    cut = torch.zeros(len(head), 1, height, width, dtype=torch.bool, device=head.device)
    before = (length / 2).floor()
    for k in range(MOST_HOLES):
        centre_x = (head[:, HOLES + 2 * k] * width).floor().view(-1, 1, 1, 1)
        centre_y = (head[:, HOLES + 2 * k + 1] * height).floor().view(-1, 1, 1, 1)
        down, right = rows - (centre_y - before), columns - (centre_x - before)
        cut |= (k < count) & (down >= 0) & (down < length) & (right >= 0) & (right < length)
    return cut


@reads_memory
def _compute(
    images: Tensor,
    table: Tensor,
    step: Tensor,
    mask: int,
    mean: list[float],
    std: list[float],
    seed: int,
    stream: int,
    first_example: int,
    flip: float,
    crop_padding: int,
) -> Tensor:
    if images.numel() == 0:
        return torch.empty_like(images, dtype=torch.float32)
    if images.device.type == "cpu":
        _check_values(table, mask, *images.shape[2:])
    backend = choose(images.device)
    if backend == "triton":
        from stn_fast.kernels import augment as kernels

        return kernels.augment(images, table, mask, mean, std, seed, step, stream, first_example, flip, crop_padding)
    if backend == "cpp":
        from stn_fast import _C

        batch, channels, height, width = images.shape
        out = torch.empty_like(images, dtype=torch.float32)
        statistics = torch.tensor([mean, std], dtype=torch.float32, device="cpu")
        _C.augment(
            address(images), address(table), own_address(statistics[0]), own_address(statistics[1]), own_address(out),
            batch, channels, height, width, mask, flip, crop_padding, first_example, seed,
            step_number("augment", step), stream, torch.get_num_threads(),
        )  # fmt: skip
        return out
    return _defined(images, table, step, mask, mean, std, seed, stream, first_example, flip, crop_padding)


def _defined(
    images: Tensor, table: Tensor, step: Tensor, mask: int, mean: list[float], std: list[float], seed: int, stream: int,
    first_example: int, flip: float, crop_padding: int,
) -> Tensor:  # fmt: skip
    strengths = {name: table[k] for k, name in enumerate(STRENGTHS) if mask >> k & 1}
    draws = draw(images, mask, step, seed, stream, first_example)
    return reference(images, strengths, draws, mean, std, flip, crop_padding)


_augment = torch.library.custom_op("stn_fast::augment", _compute, mutates_args=())


@_augment.register_fake
def _(images: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(images, dtype=torch.float32)


def augment(
    images: Tensor,
    strengths: Mapping[str, Tensor],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    step: Tensor | int,
    stream: int,
    first_example: int = 0,
    flip: float = 0.0,
    crop_padding: int = 0,
) -> Tensor:
    """Augments and normalises a batch of images in one pass, every example with its own strengths.

    The steps are in this order, with uniforms u for each example; ± stands for the strength times 2u − 1, which is in
    [−strength, strength):

    1. Geometry, about the centre, by one bilinear interpolation with black outside of the image: shear by ± degrees,
       zoom by exp((2u − 1) log(1 + scale)), rotation by ± degrees (counter-clockwise), translation by ± the fraction of
       the width and of the height. The source is a random crop of the image padded by `crop_padding`, mirrored with
       probability `flip`. If only crop and flip are on, pixels are copied.
    2. Colours in [0, 1], clamped after each: brightness x · f, contrast m + f (x − m) with m the image's mean grey,
       saturation g + f (x − g) with g the pixel's grey, each f = max(0, 1 ±), and hue + (±) turns in HSV.
       Grey is .299 R + .587 G + .114 B.
    3. (x − mean) / std for each channel.
    4. `input_scale` s: multiplies by a uniform number in [1/(1 + s), 1 + s].
    5. `input_noise`: adds normal noise of this standard deviation, in units of the normalised image.
    6. `input_dropout`: sets pixels, with all their channels, to 0 at this rate, and divides the others by 1 − rate.
    7. Cutout: sets `cutout_holes` squares of side `cutout_length` at uniform centres, clipped at the border, to 0,
       which is the mean colour. Both are rounded down.

    There are no gradients: the images are bytes, and random decisions are not differentiable.

    Args:
        images: (N, C, H, W) uint8, C = 1 or 3.
        strengths: {name: (N,) float32}, names from `STRENGTHS`, each in its `domain`; strengths not named are off.
            Values are checked on the CPU, but not on CUDA, where this would wait for the device.
        mean, std: C numbers each, for pixels in [0, 1].
        seed, step, stream, first_example: as for `dropout`. The draws of an example depend on nothing else, in
            particular not on which strengths are on.
        flip: probability of mirroring an image horizontally, in [0, 1].
        crop_padding: black pixels added on every side before a crop of the original size is cut.

    Returns:
        (N, C, H, W) float32, contiguous.

    Raises:
        ValueError: a shape, dtype, name or value does not fit; the message names the argument.
    """
    _check_images(images)
    batch, channels, height, width = images.shape
    _check_strengths(images, strengths, stream)
    mean, std = (per_channel("augment", name, numbers, channels) for name, numbers in (("mean", mean), ("std", std)))
    flip, crop_padding = check_settings("augment", std, flip, crop_padding)
    if crop_padding > min(height, width):
        raise ValueError(
            f"augment: crop_padding must be from 0 to the side of the images, {min(height, width)}, got {crop_padding}"
        )
    stream = check_stream("augment", stream)
    step, seed, first_example = check_coordinates("augment", images.device, seed, step, first_example)
    off = images.new_zeros(batch, dtype=torch.float32)
    table = torch.stack([strengths.get(name, off) for name in STRENGTHS])
    mask = sum(1 << k for k, name in enumerate(STRENGTHS) if name in strengths)
    arguments = (
        images.contiguous(), table, step, mask, mean, std, seed, stream, first_example, flip, crop_padding
    )  # fmt: skip
    if in_function_transform():
        return _defined(*arguments)
    return (_augment if traced(images, *strengths.values()) else _compute)(*arguments)


def check_settings(who: str, std: Sequence[float], flip: float, crop_padding: int) -> tuple[float, int]:
    """(flip, crop_padding); raises ValueError naming a setting that is wrong for images of any size."""
    if not all(number > 0 for number in std):
        raise ValueError(f"{who}: std must be > 0 for every channel, got {list(std)}")
    if not 0 <= real_number(who, "flip", flip) <= 1:
        raise ValueError(f"{who}: flip, a probability, must be in [0, 1], got {flip}")
    return float(flip), whole_number(who, "crop_padding", crop_padding, 0)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"augment: images must be a tensor, got {type(images).__name__}; use torch.as_tensor")
    if images.dtype != torch.uint8:
        cure = "; convert floats in [0, 1] by (255 * images).round().to(torch.uint8)"
        hint = cure if images.is_floating_point() else ""
        raise ValueError(f"augment: images must be uint8, got {images.dtype}{hint}")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        cure = "; permute(0, 3, 1, 2) puts the channels first" if images.ndim == 4 and images.shape[3] in (1, 3) else ""
        raise ValueError(f"augment: images must be (N, C, H, W) with C = 1 or 3, got {tuple(images.shape)}{cure}")
    if max(images.shape[2:]) > LONGEST_SIDE:
        raise ValueError(f"augment: images may have at most {LONGEST_SIDE} rows and columns, got {tuple(images.shape)}")


def _check_strengths(images: Tensor, strengths: Mapping[str, Tensor], stream: int) -> None:
    batch, channels = images.shape[:2]
    dual = forward_ad._current_level >= 0
    for name, strength in strengths.items():
        if name not in STRENGTHS:
            raise ValueError(f"augment has no strength {name!r}; {did_you_mean(name, STRENGTHS)}")
        check_strength("augment", name, strength, images, batch, stream)
        if strength.requires_grad or (dual and forward_ad.unpack_dual(strength).tangent is not None):
            raise ValueError(f"augment: {name} requires grad, but augmentation has no gradient; pass {name}.detach()")
        if channels != 3 and name in ("saturation", "hue"):
            raise ValueError(f"augment: {name} needs images with 3 channels, but {tuple(images.shape)} are grey")
    for one, other in (("cutout_length", "cutout_holes"), ("cutout_holes", "cutout_length")):
        if one in strengths and other not in strengths:
            raise ValueError(f"augment has a strength {one!r} without {other!r}; cutout needs both")


def per_channel(who: str, name: str, numbers: Sequence[float], channels: int) -> list[float]:
    """The numbers as floats; raises ValueError naming them if they aren't finite, with one per channel."""
    values = [float(number) for number in numbers]
    if len(values) != channels or not all(map(math.isfinite, values)):
        raise ValueError(f"{who}: {name} must be {channels} finite numbers, one per image channel, got {values}")
    return values


def _check_values(table: Tensor, mask: int, height: int, width: int) -> None:
    least, most = (ends.tolist() for ends in table.aminmax(dim=1))
    for k, name in enumerate(STRENGTHS):
        allowed = domain(name, height, width)
        if mask >> k & 1 and not allowed.holds(least[k], most[k]):
            wrong = most[k] if least[k] >= 0 else least[k]
            size = f" for images of {height} x {width}" if name == "cutout_length" else ""
            raise ValueError(f"augment: {name} must be {allowed}{size}, for every example, got {wrong:g}")
