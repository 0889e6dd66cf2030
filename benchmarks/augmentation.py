"""Baselines of `augment`: batched torch operations, and Pillow with NumPy, image by image.

Both are independent of the code of stn_fast. They use the random generators of their own library; a test gives them the
same numbers to check that they compute the same. Images are (N, 3, H, W) uint8; strengths are {name: (N,) float32}, all
thirteen. Only functions that use Pillow import it, so that the others work without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FLIP, CROP_PADDING = 0.5, 4
MOST_HOLES = 4
GREY = (0.299, 0.587, 0.114)


class Draws(NamedTuple):
    """Random numbers: tensors for a batch, or arrays for one image, which lack the first dimension."""

    one: Any  # (N, 13) uniforms, in the order of `Jitters`
    holes: Any  # (N, MOST_HOLES, 2) uniforms, x and y
    noise: Any  # (N, C, H, W) normals
    pixels: Any  # (N, 1, H, W) uniforms


class Jitters(NamedTuple):
    """The 13 uniforms of an image by their use: tensors for a batch, numbers for one image."""

    flip: Any
    crop_x: Any
    crop_y: Any
    rotation: Any
    shift_x: Any
    shift_y: Any
    zoom: Any
    shear: Any
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any
    gain: Any


def draw(images: Tensor) -> Draws:
    """New numbers from torch's generator."""
    batch, channels, height, width = images.shape
    return Draws(
        torch.rand(batch, 13, device=images.device),
        torch.rand(batch, MOST_HOLES, 2, device=images.device),
        torch.randn(batch, channels, height, width, device=images.device),
        torch.rand(batch, 1, height, width, device=images.device),
    )


def augment(images: Tensor, strengths: Mapping[str, Tensor], draws: Draws) -> Tensor:
    """Augments the whole batch at once, by torch operations."""
    u = Jitters(*draws.one.view(len(images), 13, 1, 1, 1).unbind(1))
    s = {name: strength.view(-1, 1, 1, 1) for name, strength in strengths.items()}
    theta = _theta(images, strengths, Jitters(*(draw.flatten() for draw in u)))
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(images.float().div_(255), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = x.new_tensor(GREY).view(1, 3, 1, 1)

    def factor(draw: Tensor, strength: Tensor) -> Tensor:
        return (1 + (2 * draw - 1) * strength).clamp_(min=0)

    x = x.mul_(factor(u.brightness, s["brightness"])).clamp_(0, 1)
    x = torch.lerp((x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True), x, factor(u.contrast, s["contrast"]))
    x = x.clamp_(0, 1)
    x = torch.lerp((x * weights).sum(1, keepdim=True), x, factor(u.saturation, s["saturation"])).clamp_(0, 1)
    x = _turn_hue(x, ((2 * u.hue - 1) * s["hue"]).squeeze(1))
    x = x.sub_(x.new_tensor(MEAN).view(1, 3, 1, 1)).div_(x.new_tensor(STD).view(1, 3, 1, 1))
    high = 1 + s["input_scale"]
    x = x.mul_(torch.lerp(1 / high, high, u.gain))
    x = x.add_(draws.noise * s["input_noise"])
    keep = draws.pixels >= s["input_dropout"]
    x = x.mul_(keep / (1 - s["input_dropout"]))
    return x.masked_fill_(_holes(x, strengths, draws.holes), 0)


def _theta(images: Tensor, strengths: Mapping[str, Tensor], u: Jitters) -> Tensor:
    """(N, 2, 3) of affine_grid: output to source, in coordinates that span [-1, 1]."""
    height, width = images.shape[2:]
    angle = torch.deg2rad((2 * u.rotation - 1) * strengths["rotation"])
    slope = torch.tan(torch.deg2rad((2 * u.shear - 1) * strengths["shear"]))
    zoom = torch.exp((2 * u.zoom - 1) * torch.log1p(strengths["scale"]))
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    xx, xy, yx, yy = cosine - slope * sine, -sine - slope * cosine, sine, cosine
    shift_x = (2 * u.shift_x - 1) * strengths["translation"] * width
    shift_y = (2 * u.shift_y - 1) * strengths["translation"] * height
    x0 = torch.floor(u.crop_x * (2 * CROP_PADDING + 1)) - CROP_PADDING - xx * shift_x - xy * shift_y
    y0 = torch.floor(u.crop_y * (2 * CROP_PADDING + 1)) - CROP_PADDING - yx * shift_x - yy * shift_y
    mirror = torch.where(u.flip < FLIP, -1.0, 1.0)
    first = torch.stack([mirror * xx, mirror * xy * height / width, mirror * x0 * 2 / width], dim=1)
    return torch.stack([first, torch.stack([yx * width / height, yy, y0 * 2 / height], dim=1)], dim=1)


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue).add_(6 * turns)
    k = (hue[:, None] + x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder_(6)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _holes(x: Tensor, strengths: Mapping[str, Tensor], draws: Tensor) -> Tensor:
    height, width = x.shape[2:]
    length = strengths["cutout_length"].floor().view(-1, 1, 1)
    left = torch.floor(draws[..., :1] * width) - torch.floor(length / 2)
    top = torch.floor(draws[..., 1:] * height) - torch.floor(length / 2)
    columns, rows = torch.arange(width, device=x.device), torch.arange(height, device=x.device)
    across, down = (columns >= left) & (columns < left + length), (rows >= top) & (rows < top + length)
    down &= (torch.arange(MOST_HOLES, device=x.device) < strengths["cutout_holes"].floor()[:, None])[:, :, None]
    return (down[..., None] & across[..., None, :]).any(1, keepdim=True)


def augment_image_by_image(
    images: NDArray[np.uint8],
    strengths: NDArray[np.float32],
    names: tuple[str, ...],
    transform: Callable[[NDArray[np.uint8], Mapping[str, float], Draws], NDArray[np.float32]] | None = None,
) -> Tensor:
    """Augments image by image, like a data loader without workers: images (N, H, W, 3), strengths (N, 13)."""
    generator = np.random.default_rng()
    _, height, width, _ = images.shape
    with_noise = "input_noise" in names
    augmented = []
    for image, row in zip(images, strengths.tolist(), strict=True):
        draws = Draws(
            generator.random(13, np.float32),
            generator.random((MOST_HOLES, 2), np.float32),
            generator.standard_normal((3, height, width), np.float32) if with_noise else None,
            generator.random((1, height, width), np.float32),
        )
        augmented.append((transform or augment_image)(image, dict(zip(names, row, strict=True)), draws))
    return torch.from_numpy(np.stack(augmented))


def augment_image(image: NDArray[np.uint8], s: Mapping[str, float], draws: Draws) -> NDArray[np.float32]:
    """One image (H, W, 3): geometry and colours by Pillow, on bytes; the rest by NumPy. (3, H, W)."""
    from PIL import Image

    height, width, _ = image.shape
    u = Jitters(*draws.one.tolist())
    picture = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, _coefficients(width, height, s, u), Image.Resampling.BILINEAR
    )
    x = _normalised(_coloured(picture, s, u))
    high = 1 + s["input_scale"]
    x *= np.float32(1 / high + u.gain * (high - 1 / high))
    x += np.float32(s["input_noise"]) * draws.noise
    x *= (draws.pixels >= s["input_dropout"]) * np.float32(1 / (1 - s["input_dropout"]))
    _cut(x, s, draws)
    return x


def augment_image_for_cifar10(image: NDArray[np.uint8], s: Mapping[str, float], draws: Draws) -> NDArray[np.float32]:
    """Only the parts that the CIFAR-10 recipe tunes, without geometry and noise. (3, H, W)."""
    from PIL import Image

    u = Jitters(*draws.one.tolist())
    x = _normalised(_coloured(Image.fromarray(image), s, u))
    high = 1 + s["input_scale"]
    x *= np.float32(1 / high + u.gain * (high - 1 / high))
    x *= (draws.pixels >= s["input_dropout"]) * np.float32(1 / (1 - s["input_dropout"]))
    _cut(x, s, draws)
    return x


def _coloured(picture: Image, s: Mapping[str, float], u: Jitters) -> Image:
    from PIL import Image, ImageEnhance

    picture = ImageEnhance.Brightness(picture).enhance(max(0, 1 + (2 * u.brightness - 1) * s["brightness"]))
    picture = ImageEnhance.Contrast(picture).enhance(max(0, 1 + (2 * u.contrast - 1) * s["contrast"]))
    picture = ImageEnhance.Color(picture).enhance(max(0, 1 + (2 * u.saturation - 1) * s["saturation"]))
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(round(256 * (2 * u.hue - 1) * s["hue"]) % 256)
    return Image.fromarray(hsv, "HSV").convert("RGB")


def _normalised(picture: Image) -> NDArray[np.float32]:
    x = np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(255)
    normalised: NDArray[np.float32] = (x - np.array(MEAN, np.float32)[:, None, None]) / np.array(STD, np.float32)[
        :, None, None
    ]
    return normalised


def _cut(x: NDArray[np.float32], s: Mapping[str, float], draws: Draws) -> None:
    _, height, width = x.shape
    length = int(s["cutout_length"])
    for centre_x, centre_y in draws.holes[: int(s["cutout_holes"])].tolist():
        left, top = int(centre_x * width) - length // 2, int(centre_y * height) - length // 2
        x[:, max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0


def _coefficients(width: int, height: int, s: Mapping[str, float], u: Jitters) -> tuple[float, ...]:
    """Output to source, both counted from the corner of the corner pixel, as Pillow counts."""
    angle, slope = (
        (2 * draw - 1) * math.radians(s[name]) for draw, name in ((u.rotation, "rotation"), (u.shear, "shear"))
    )
    slope, zoom = math.tan(slope), math.exp((2 * u.zoom - 1) * math.log1p(s["scale"]))
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    xx, xy, yx, yy = cosine - slope * sine, -sine - slope * cosine, sine, cosine
    from_x = width / 2 + (2 * u.shift_x - 1) * s["translation"] * width
    from_y = height / 2 + (2 * u.shift_y - 1) * s["translation"] * height
    crop_x, crop_y = (math.floor(draw * (2 * CROP_PADDING + 1)) - CROP_PADDING for draw in (u.crop_x, u.crop_y))
    x0, y0 = width / 2 + crop_x - xx * from_x - xy * from_y, height / 2 + crop_y - yx * from_x - yy * from_y
    if u.flip < FLIP:
        xx, xy, x0 = -xx, -xy, width - x0
    return xx, xy, x0, yx, yy, y0
