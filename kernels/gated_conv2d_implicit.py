"""Gated convolution as one matrix kernel: both branches and the epilogue, for channels_last images.

An implicit product: row m of (B·Ho·Wo) is an output pixel, the sum runs over the taps of the filter and, within a tap,
over channels, which lie side by side. Pixels beyond the border are masked. Two accumulators hold the tiles of
P = conv(x, W) and Q = conv(x, R), so x is read once, and y = P + scale ⊙ Q + shift leaves with no pass of its own.
Row numbers are 32 bits wide, addresses 64.
"""
# ruff: noqa: E741 (O outputs)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, device_guard, narrow, refuse_float64
from .matmul import FLOAT32_CONFIGS, config_name, configs, dot, halves, matrix_config, tile_order

# float32 images in TF32, which is what the library's convolutions use unless told otherwise: on tensor cores a tile
# may be as large as in 16 bits, in steps of half the length.
TF32_HOPPER_CONFIGS = [
    matrix_config(128, 128, 32, 8, 3),
    matrix_config(128, 64, 32, 8, 3),
    matrix_config(64, 128, 32, 8, 3),
    matrix_config(64, 64, 32, 4, 4),
]
TF32_AMPERE_CONFIGS = [matrix_config(128, 64, 32, 8, 3), matrix_config(64, 64, 32, 4, 3)]


@triton.jit
def gated_conv2d_fwd_kernel(
    p_x,
    p_weight,
    p_response_weight,
    p_scale,
    p_shift,
    p_y,
    p_q,
    M,
    O,
    channels,
    height,
    width,
    out_pixels,
    out_width,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    q_row,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    RELU: tl.constexpr,
    STORE_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_tile_m, i_tile_o = tile_order(tl.program_id(0), M, O, BLOCK_M, BLOCK_N, 8)
    i_m = i_tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_o = i_tile_o * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = i_m < M, i_o < O
    i_k = tl.arange(0, BLOCK_K)
    i_example = (i_m // out_pixels).to(tl.int64)
    i_pixel = i_m % out_pixels
    i_left = i_pixel % out_width * stride_w - pad_w
    # Rows past the end lie far above the image, so that the mask of the border covers them.
    i_top = tl.where(in_m, i_pixel // out_width * stride_h - pad_h, -(2**30))
    i_corner = ((i_example * height + i_top) * width + i_left) * channels
    # Outputs past the end read the first instead of being masked: what they give isn't stored.
    i_filter = tl.where(in_o, i_o, 0).to(tl.int64) * (KERNEL_H * KERNEL_W) * channels
    steps = tl.cdiv(channels, BLOCK_K)

    b_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_q = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, KERNEL_H * KERNEL_W * steps):
        tap = step // steps
        i_channel = (step % steps) * BLOCK_K + i_k
        shift_h, shift_w = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
        row, column = i_top + shift_h, i_left + shift_w
        in_image = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        i_shift = (tl.cast(shift_h, tl.int64) * width + shift_w) * channels
        p_x_tile = p_x + (i_corner + i_shift)[:, None] + i_channel[None, :]
        i_weight = (i_filter + tl.cast(tap, tl.int64) * channels)[None, :] + i_channel[:, None]
        if EVEN_K:
            b_x = tl.load(p_x_tile, mask=in_image[:, None], other=0.0)
            b_weight = tl.load(p_weight + i_weight)
            b_response = tl.load(p_response_weight + i_weight)
        else:
            in_k = i_channel < channels
            b_x = tl.load(p_x_tile, mask=in_image[:, None] & in_k[None, :], other=0.0)
            b_weight = tl.load(p_weight + i_weight, mask=in_k[:, None], other=0.0)
            b_response = tl.load(p_response_weight + i_weight, mask=in_k[:, None], other=0.0)
        b_p = dot(b_x, b_weight, b_p, PRECISION)
        b_q = dot(b_x, b_response, b_q, PRECISION)

    # Gates would be a third tile; in two halves they fit the registers that the products leave.
    b_p0, b_p1 = halves(b_p, BLOCK_M, BLOCK_N)
    b_q0, b_q1 = halves(b_q, BLOCK_M, BLOCK_N)
    for half in tl.static_range(2):
        i_o = i_tile_o * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        b_y, b_z = (b_p0, b_q0) if half == 0 else (b_p1, b_q1)
        inside = in_m[:, None] & (i_o < O)[None, :]
        i_gate = (i_example * O)[:, None] + i_o[None, :]
        i_row = i_m.to(tl.int64)[:, None]
        if STORE_Q:
            tl.store(p_q + i_row * q_row + i_o[None, :], narrow(b_z, p_q.dtype.element_ty), mask=inside)
        b_y += b_z * tl.load(p_scale + i_gate, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            b_y += tl.load(p_shift + i_gate, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
        tl.store(p_y + i_row * O + i_o[None, :], narrow(b_y, p_y.dtype.element_ty), mask=inside)


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32, as torch's own convolutions do; 16-bit numbers are exact either way."""
    allowed = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def conv_configs(dtype: torch.dtype, aligned: bool, capability: tuple[int, int], dots: str) -> list[triton.Config]:
    """What may run, the smallest last: `aligned` says that channels and outputs are multiples of 16."""
    if dots == "tf32" and aligned:
        return (TF32_HOPPER_CONFIGS if capability >= (9, 0) else TF32_AMPERE_CONFIGS) + FLOAT32_CONFIGS[-1:]
    return configs(dtype, aligned, capability)


def shipped(x: Tensor, weight: Tensor) -> dict[str, triton.Config]:
    """The configurations for this problem by name."""
    aligned = x.shape[1] % 16 == 0 and weight.shape[0] % 16 == 0
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    return {config_name(c): c for c in conv_configs(x.dtype, aligned, capability, precision(x.dtype))}


def output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(Ho, Wo) of a convolution."""
    height, width = (
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    )
    return height, width


def implicit_gemm(
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    save_response: bool,
    config: triton.Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, q): q = conv(x, R) (B, 1, O, Ho, Wo), y = conv(x, W) + scale ⊙ q + shift, then max(y, 0) where asked.

    x: (B, C, H, W), and weight, response_weight: (O, C, kh, kw), of one dtype; brought to channels_last where they
    aren't. scale, shift: (B, O) of any floating dtype. stride, padding, dilation: pairs. By default the smallest
    configuration is used, which runs on every device.

    y is channels_last. q, where it is to be saved, has the strides that it has as half of a convolution with [W; R]:
    a caller whose graph was compiled for one way of computing it gets the same from the other.

    Raises:
        TypeError: x is float64. ValueError: there are more output pixels than 32 bits count.
    """
    refuse_float64("gated_conv2d", x=x)
    outputs, channels, kernel_h, kernel_w = weight.shape
    out_height, out_width = output_size(x, weight, stride, padding, dilation)
    rows = x.shape[0] * out_height * out_width
    if max(rows, outputs) > 2**31 - 1024:
        raise ValueError(f"gated_conv2d: pixel numbers are 32 bits wide; got x {tuple(x.shape)}")
    chosen = config or list(shipped(x, weight).values())[-1]
    x, weight, response_weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, response_weight))
    size = (x.shape[0], outputs, out_height, out_width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    q = None
    if save_response:
        both = torch.empty(
            (size[0], 2 * outputs, *size[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        q = both.unflatten(1, (1, 2, outputs))[:, :, 1]
    meta = chosen.kwargs
    with device_guard(x):
        gated_conv2d_fwd_kernel[(ceil_div(rows, meta["BLOCK_M"]) * ceil_div(outputs, meta["BLOCK_N"]),)](
            x,
            weight,
            response_weight,
            scale.contiguous(),
            None if shift is None else shift.contiguous(),
            y,
            q,
            rows,
            outputs,
            channels,
            x.shape[2],
            x.shape[3],
            out_height * out_width,
            out_width,
            *stride,
            *padding,
            *dilation,
            2 * outputs,
            KERNEL_H=kernel_h,
            KERNEL_W=kernel_w,
            HAS_SHIFT=shift is not None,
            RELU=relu,
            STORE_Q=save_response,
            EVEN_K=channels % meta["BLOCK_K"] == 0,
            PRECISION=precision(x.dtype),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
            **meta,
        )
    return y, q
