"""Brightness, contrast, saturation and hue of pixels in [0, 1], as blocks of red, green and blue.

A grey image passes the same block three times; the compiler computes it once.
"""

import triton
import triton.language as tl


@triton.jit
def unit_interval(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def jitter(uniform, strength):
    """A factor from [1 - strength, 1 + strength], never below 0."""
    return tl.maximum(1.0 + (2.0 * uniform - 1.0) * strength, 0.0)


@triton.jit
def grey_of(b_red, b_green, b_blue, CHANNELS: tl.constexpr):
    if CHANNELS == 1:
        return b_red
    else:
        return 0.299 * b_red + 0.587 * b_green + 0.114 * b_blue


@triton.jit
def blend(b, towards, factor):
    """`towards` at factor 0, b at 1, beyond b above."""
    return unit_interval(towards + factor * (b - towards))


@triton.jit
def shade(b_hue, b_value, b_chroma, offset: tl.constexpr):
    """One channel of a colour; hue in sextants >= 0. The offset is 5 for red, 3 for green and 1 for blue."""
    sextant = b_hue + offset
    sextant -= 6.0 * tl.floor(sextant * (1.0 / 6.0))
    return b_value - b_chroma * unit_interval(tl.minimum(sextant, 4.0 - sextant))


@triton.jit
def turn_hue(b_red, b_green, b_blue, turns):
    """Adds to the hue of HSV; value and saturation stay."""
    b_value = tl.maximum(tl.maximum(b_red, b_green), b_blue)
    b_chroma = b_value - tl.minimum(tl.minimum(b_red, b_green), b_blue)
    per_chroma = 1.0 / tl.where(b_chroma > 0, b_chroma, 1.0)
    from_red = (b_green - b_blue) * per_chroma
    from_green = (b_blue - b_red) * per_chroma + 2.0
    from_blue = (b_red - b_green) * per_chroma + 4.0
    b_hue = tl.where(b_value == b_red, from_red, tl.where(b_value == b_green, from_green, from_blue)) + 6.0 * turns
    return shade(b_hue, b_value, b_chroma, 5), shade(b_hue, b_value, b_chroma, 3), shade(b_hue, b_value, b_chroma, 1)
