"""Augmentation of uint8 images, each under its own strengths, in one pass to normalised floats.

Geometry, colours, normalisation, scale, noise, dropout of pixels and cutout, in this order. Of the random numbers of
an image, 0 to 63 decide what holds for the whole of it, the later ones what holds for a value or a pixel.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_colour import blend, grey_of, jitter, turn_hue, unit_interval
from .augment_geometry import affine_source, bilinear, crop_shift, near, pixel_at, uniform_log_zoom
from .launch import ceil_div, device_guard, words_in_range
from .random import draw_words, in_element_order, normal_of, normals_in_order, uniform_of

# Rows of the table of strengths; bit k of the mask ON says that row k is on.
BRIGHTNESS = tl.constexpr(0)
CONTRAST = tl.constexpr(1)
SATURATION = tl.constexpr(2)
HUE = tl.constexpr(3)
INPUT_SCALE = tl.constexpr(4)
INPUT_NOISE = tl.constexpr(5)
ROTATION = tl.constexpr(6)
TRANSLATION = tl.constexpr(7)
SCALE = tl.constexpr(8)
SHEAR = tl.constexpr(9)
CUTOUT_LENGTH = tl.constexpr(10)
CUTOUT_HOLES = tl.constexpr(11)
INPUT_DROPOUT = tl.constexpr(12)
AFFINE = tl.constexpr(0b1111 << 6)  # rotation, translation, scale, shear

MAX_HOLES = tl.constexpr(24)  # they draw numbers 16 to 63
FIRST_QUAD = tl.constexpr(16)  # of the numbers of values

# Pixels a program. The first that holds a whole image is taken, so that it can tell the mean of it.
TILES = [
    triton.Config({"PIXELS": 64}, num_warps=1),
    triton.Config({"PIXELS": 256}, num_warps=2),
    triton.Config({"PIXELS": 1024}, num_warps=8),
]
# Positions within an image are numbered in 32 bits, to the end of the tile that holds its last pixel.
MAX_VALUES = 2**31 - 4096


@triton.jit
def four_uniforms(quad, example, p_step, seed, stream):
    w0, w1, w2, w3 = draw_words(tl.cast(quad, tl.uint32), example, p_step, seed, stream)
    return uniform_of(w0), uniform_of(w1), uniform_of(w2), uniform_of(w3)


@triton.jit
def strength(p_column, images, ON: tl.constexpr, ROW: tl.constexpr):
    """0 where it is off. p_column points at the image's column of the table."""
    if 2**ROW & ON:
        return tl.load(p_column + images.to(tl.int64) * ROW)
    else:
        return tl.full((), 0.0, tl.float32)


@triton.jit
def lit_pixels(
    p_image,
    p_column,
    images,
    i_pixel,
    H,
    W,
    flip,
    crop_padding,
    example,
    p_step,
    seed,
    stream,
    ON: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Red, green and blue of output pixels after geometry and brightness: what contrast takes the mean of."""
    u_flip, u_crop_x, u_crop_y, u_rotation = four_uniforms(0, example, p_step, seed, stream)
    crop_x, crop_y = crop_shift(u_crop_x, crop_padding), crop_shift(u_crop_y, crop_padding)
    p_green = p_image + (CHANNELS // 2) * (H * W)
    p_blue = p_image + (CHANNELS - 1) * (H * W)
    i_x, i_y = i_pixel % W, i_pixel // W
    if AFFINE & ON:
        u_shift_x, u_shift_y, u_zoom, u_shear = four_uniforms(1, example, p_step, seed, stream)
        translation = strength(p_column, images, ON, TRANSLATION)
        x, y = affine_source(
            i_x,
            i_y,
            H,
            W,
            (2.0 * u_rotation - 1.0) * strength(p_column, images, ON, ROTATION),
            (2.0 * u_shift_x - 1.0) * translation * W,
            (2.0 * u_shift_y - 1.0) * translation * H,
            uniform_log_zoom(u_zoom, strength(p_column, images, ON, SCALE)),
            (2.0 * u_shear - 1.0) * strength(p_column, images, ON, SHEAR),
        )
        x = near(tl.where(u_flip < flip, W - 1 - (x + crop_x), x + crop_x), W)
        y = near(y + crop_y, H)
        b_red = bilinear(p_image, x, y, H, W)
        b_green, b_blue = bilinear(p_green, x, y, H, W), bilinear(p_blue, x, y, H, W)
    else:
        x, y = tl.where(u_flip < flip, W - 1 - (i_x + crop_x), i_x + crop_x), i_y + crop_y
        b_red = pixel_at(p_image, x, y, H, W)
        b_green, b_blue = pixel_at(p_green, x, y, H, W), pixel_at(p_blue, x, y, H, W)
    if 2**BRIGHTNESS & ON:
        uniform, _, _, _ = four_uniforms(2, example, p_step, seed, stream)
        factor = jitter(uniform, strength(p_column, images, ON, BRIGHTNESS))
        b_red = unit_interval(b_red * factor)
        b_green, b_blue = unit_interval(b_green * factor), unit_interval(b_blue * factor)
    return b_red, b_green, b_blue


@triton.jit
def normals_from(first, example, p_step, seed, stream, ALIGNED: tl.constexpr, PIXELS: tl.constexpr):
    """Normals of neighbouring values; four share a counter where the first is known to begin one."""
    if ALIGNED:
        quad = tl.arange(0, PIXELS // 4) + first // 4 + FIRST_QUAD
        w0, w1, w2, w3 = draw_words(quad, example, p_step, seed, stream)
        return normals_in_order(w0, w1, w2, w3)
    else:
        element = first + tl.arange(0, PIXELS)
        w0, w1, w2, w3 = draw_words(element // 4 + FIRST_QUAD, example, p_step, seed, stream)
        return normal_of(element, w0, w1, w2, w3)


@triton.jit
def in_square(i_x, i_y, u_x, u_y, side, H, W):
    left, upper = tl.floor(u_x * W).to(tl.int32) - side // 2, tl.floor(u_y * H).to(tl.int32) - side // 2
    return (i_x >= left) & (i_x < left + side) & (i_y >= upper) & (i_y < upper + side)


@triton.jit
def cut_out(i_pixel, H, W, length, holes, example, p_step, seed, stream):
    """Whether a pixel lies in a hole: squares at uniform centres, clipped at the border."""
    side = length.to(tl.int32)
    count = tl.minimum(holes.to(tl.int32), MAX_HOLES)
    i_x, i_y = i_pixel % W, i_pixel // W
    cut = i_pixel < 0
    for pair in range(0, (count + 1) // 2):
        u_x0, u_y0, u_x1, u_y1 = four_uniforms(4 + pair, example, p_step, seed, stream)
        cut |= in_square(i_x, i_y, u_x0, u_y0, side, H, W)
        cut |= in_square(i_x, i_y, u_x1, u_y1, side, H, W) & (2 * pair + 1 < count)
    return cut


@triton.jit(do_not_specialize=["images", "crop_padding", "first_example", "seed", "stream"])
def augment_grey_kernel(
    p_images,
    p_table,
    p_step,
    p_grey,
    images,
    H,
    W,
    tiles,
    flip,
    crop_padding,
    first_example,
    seed,
    stream,
    ON: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The sum of grey over each tile of an image that one program can't hold."""
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_pixel = i_tile * PIXELS + tl.arange(0, PIXELS)
    b_red, b_green, b_blue = lit_pixels(
        p_images + i_image * (CHANNELS * (H * W)), p_table + i_image, images, i_pixel, H, W,
        flip, crop_padding, first_example + i_image, p_step, seed, stream, ON, CHANNELS,
    )  # fmt: skip
    b_grey = tl.where(i_pixel < H * W, grey_of(b_red, b_green, b_blue, CHANNELS), 0.0)
    tl.store(p_grey + i_image * tiles + i_tile, tl.sum(b_grey, axis=0))


@triton.jit(do_not_specialize=["images", "crop_padding", "first_example", "seed", "stream"])
def augment_kernel(
    p_images,
    p_table,
    p_step,
    p_grey,
    p_out,
    images,
    H,
    W,
    tiles,
    mean_red,
    mean_green,
    mean_blue,
    std_red,
    std_green,
    std_blue,
    flip,
    crop_padding,
    first_example,
    seed,
    stream,
    ON: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One tile of one image. p_grey holds the mean of every image where a tile is not the WHOLE of one."""
    i_image = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    i_pixel = i_tile * PIXELS + tl.arange(0, PIXELS)
    pixels = H * W
    inside = i_pixel < pixels
    example = first_example + i_image
    p_column = p_table + i_image
    b_red, b_green, b_blue = lit_pixels(
        p_images + i_image * (CHANNELS * pixels), p_column, images, i_pixel, H, W,
        flip, crop_padding, example, p_step, seed, stream, ON, CHANNELS,
    )  # fmt: skip

    _, u_contrast, u_saturation, u_hue = four_uniforms(2, example, p_step, seed, stream)
    if 2**CONTRAST & ON:
        if WHOLE:
            b_grey = tl.where(inside, grey_of(b_red, b_green, b_blue, CHANNELS), 0.0)
            grey = tl.sum(b_grey, axis=0) / pixels
        else:
            grey = tl.load(p_grey + i_image)
        factor = jitter(u_contrast, strength(p_column, images, ON, CONTRAST))
        b_red, b_green, b_blue = blend(b_red, grey, factor), blend(b_green, grey, factor), blend(b_blue, grey, factor)
    if 2**SATURATION & ON:
        grey = grey_of(b_red, b_green, b_blue, CHANNELS)
        factor = jitter(u_saturation, strength(p_column, images, ON, SATURATION))
        b_red, b_green, b_blue = blend(b_red, grey, factor), blend(b_green, grey, factor), blend(b_blue, grey, factor)
    if 2**HUE & ON:
        turns = (2.0 * u_hue - 1.0) * strength(p_column, images, ON, HUE)
        b_red, b_green, b_blue = turn_hue(b_red, b_green, b_blue, turns)

    keep, gain = inside, tl.full((), 1.0, tl.float32)
    if 2**INPUT_SCALE & ON:
        uniform, _, _, _ = four_uniforms(3, example, p_step, seed, stream)
        high = 1.0 + strength(p_column, images, ON, INPUT_SCALE)
        gain = 1.0 / high + uniform * (high - 1.0 / high)
    if 2**INPUT_DROPOUT & ON:
        rate = strength(p_column, images, ON, INPUT_DROPOUT)
        quad = tl.arange(0, PIXELS // 4) + i_tile * (PIXELS // 4) + (CHANNELS * pixels + 3) // 4 + FIRST_QUAD
        w0, w1, w2, w3 = draw_words(quad, example, p_step, seed, stream)
        keep = uniform_of(in_element_order(w0, w1, w2, w3)) >= rate
        kept = 1.0 / (1.0 - rate)
    if 2**CUTOUT_HOLES & ON:
        length, holes = strength(p_column, images, ON, CUTOUT_LENGTH), strength(p_column, images, ON, CUTOUT_HOLES)
        keep &= ~cut_out(i_pixel, H, W, length, holes, example, p_step, seed, stream)

    p_tile = p_out + i_image * (CHANNELS * pixels) + i_pixel
    for channel in tl.static_range(CHANNELS):
        if channel == 0:
            b_out = (b_red - mean_red) / std_red
        elif channel == 1:
            b_out = (b_green - mean_green) / std_green
        else:
            b_out = (b_blue - mean_blue) / std_blue
        b_out *= gain
        if 2**INPUT_NOISE & ON:
            first = channel * pixels + i_tile * PIXELS
            b_normal = normals_from(first, example, p_step, seed, stream, ALIGNED, PIXELS)
            b_out += strength(p_column, images, ON, INPUT_NOISE) * b_normal
        if 2**INPUT_DROPOUT & ON:
            b_out *= kept
        # Chosen, not multiplied: what is dropped or cut out is 0 even where the scale is infinite.
        tl.store(p_tile + channel * pixels, tl.where(keep, b_out, 0.0), mask=inside)


def tile_of(pixels: int) -> triton.Config:
    return next((tile for tile in TILES if tile.kwargs["PIXELS"] >= pixels), TILES[-1])


def augment(
    images: Tensor,
    table: Tensor,
    mask: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    step: Tensor,
    stream: int,
    first_example: int,
    flip: float,
    crop_padding: int,
) -> Tensor:
    """(N, C, H, W) float32 from contiguous uint8 images, C = 1 or 3; table (13, N) float32, bit k of mask: row k is on.

    step is a 0-dim int64 tensor on the device of the images. Raises ValueError for images of more than MAX_VALUES.
    """
    count, channels, height, width = images.shape
    pixels = height * width
    if channels * pixels > MAX_VALUES:
        raise ValueError(
            f"augment: positions in an image are 32 bits wide, so at most {MAX_VALUES} values fit; "
            f"got {channels * pixels} in images {tuple(images.shape)}"
        )
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    if not out.numel():
        return out
    tile = tile_of(pixels)
    tiles = ceil_div(pixels, tile.kwargs["PIXELS"])
    first_example, stream = words_in_range(first_example, stream)
    draw = (float(flip), crop_padding, first_example, seed, stream)
    options = dict(ON=mask, CHANNELS=channels, num_warps=tile.num_warps, **tile.kwargs)
    with device_guard(images):
        grey = None
        if tiles > 1 and mask >> CONTRAST.value & 1:
            # Each program sums its own tile and the sums are added in a fixed order: the same bits at every run.
            sums = torch.empty(count, tiles, dtype=torch.float32, device=images.device)
            augment_grey_kernel[(count * tiles,)](
                images, table, step, sums, count, height, width, tiles, *draw, **options
            )
            grey = sums.sum(1) / pixels
        normalisation = [float(values[min(k, channels - 1)]) for values in (mean, std) for k in range(3)]
        augment_kernel[(count * tiles,)](
            images, table, step, grey, out, count, height, width, tiles, *normalisation, *draw,
            WHOLE=tiles == 1, ALIGNED=pixels % 4 == 0, **options,
        )  # fmt: skip
    return out
