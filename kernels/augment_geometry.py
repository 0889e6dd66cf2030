"""Where in its source image an output pixel lies, and what is read there."""

import triton
import triton.language as tl

from .perturb import exp_minus
from .random import log_positive, sincos_reduced


@triton.jit
def sincos_degrees(angle):
    turns = angle * (1.0 / 360.0)
    quarter = tl.floor(turns * 4.0 + 0.5)
    return sincos_reduced(quarter.to(tl.int32), turns - quarter * 0.25)


@triton.jit
def affine_source(i_x, i_y, H, W, angle, shift_x, shift_y, log_zoom, shear):
    """Undoes p' = c + Rot(angle) zoom [[1, tan shear], [0, 1]] (p - c) + shift, c the centre of the image.

    Angles are in degrees, counter-clockwise as seen, with y pointing down; all but i_x and i_y are scalars.
    """
    centre_x, centre_y = (W - 1) * 0.5, (H - 1) * 0.5
    sine, cosine = sincos_degrees(angle)
    shear_sine, shear_cosine = sincos_degrees(shear)
    smaller = exp_minus(tl.abs(log_zoom))
    unzoom = tl.where(log_zoom < 0, 1.0 / smaller, smaller)
    d_x, d_y = i_x.to(tl.float32) - centre_x - shift_x, i_y.to(tl.float32) - centre_y - shift_y
    turned_x = (cosine * d_x - sine * d_y) * unzoom
    turned_y = (sine * d_x + cosine * d_y) * unzoom
    return turned_x - shear_sine / shear_cosine * turned_y + centre_x, turned_y + centre_y


@triton.jit
def uniform_log_zoom(uniform, scale):
    """From [-log(1 + scale), log(1 + scale)]."""
    return (2.0 * uniform - 1.0) * log_positive(1.0 + scale)


@triton.jit
def crop_shift(uniform, padding):
    """One of -padding, ..., padding."""
    return tl.floor(uniform * (2 * padding + 1)).to(tl.int32) - padding


@triton.jit
def near(coordinate, size):
    """Points beyond the border are moved to where all is black: also infinities and NaN."""
    coordinate = tl.where(coordinate > -1.0, coordinate, -1.0)
    return tl.where(coordinate < size, coordinate, size * 1.0)


@triton.jit
def byte_at(p_plane, i_x, i_y, H, W):
    """0 to 255, black outside the image."""
    inside = (i_x >= 0) & (i_x < W) & (i_y >= 0) & (i_y < H)
    return tl.load(p_plane + (i_y * W + i_x), mask=inside, other=0).to(tl.float32)


@triton.jit
def pixel_at(p_plane, i_x, i_y, H, W):
    """In [0, 1]; the quotient is the nearest number, so that a copy is exact."""
    return tl.div_rn(byte_at(p_plane, i_x, i_y, H, W), 255.0)


@triton.jit
def bilinear(p_plane, x, y, H, W):
    """Between the four pixels around (x, y)."""
    left, top = tl.floor(x), tl.floor(y)
    to_right, to_bottom = x - left, y - top
    i_x, i_y = left.to(tl.int32), top.to(tl.int32)
    upper = (1.0 - to_right) * byte_at(p_plane, i_x, i_y, H, W) + to_right * byte_at(p_plane, i_x + 1, i_y, H, W)
    lower_left, lower_right = byte_at(p_plane, i_x, i_y + 1, H, W), byte_at(p_plane, i_x + 1, i_y + 1, H, W)
    lower = (1.0 - to_right) * lower_left + to_right * lower_right
    return ((1.0 - to_bottom) * upper + to_bottom * lower) * (1.0 / 255.0)
