"""Gated convolutions on a GPU: y = conv(x, W) + scale ⊙ conv(x, R) + shift, gates over whole channels of an example.

Two ways forward, and the autotuner chooses: one library convolution with the filters [W; R] and a fused pass beside
it ("library"), or one Triton kernel for all of it. Backward, the convolutions are the library's, on the gradients
of both branches that one fused pass leaves.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .autotune import size_bucket, tuner
from .gated_conv2d_backward import epilogue_backward
from .gated_conv2d_epilogue import epilogue_forward
from .gated_conv2d_implicit import implicit_gemm, output_size, precision, shipped

__all__ = ["choose_forward", "epilogue_backward", "epilogue_forward", "implicit_gemm"]

LIBRARY = "library"
# Fewer channels leave most of the implicit product's steps empty; the library has kernels of their own for these.
LEAST_CHANNELS = 16

Result = tuple[Tensor, Tensor | None]


def choose_forward(
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    save_response: bool,
    library: Callable[[], Result],
) -> Result:
    """(y, q) of `library` or of `implicit_gemm`, whichever is faster for such a problem on this device.

    `library` computes the same from one convolution and `epilogue_forward`. Arguments are those of `implicit_gemm`,
    which takes part for channels_last images, one group and at least LEAST_CHANNELS channels.
    """
    candidates: dict[str, Callable[[], Result]] = {LIBRARY: library}
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if channels_last and groups == 1 and x.shape[1] >= LEAST_CHANNELS:
        operands = (x, weight, response_weight, scale, shift, stride, padding, dilation, relu, save_response)
        candidates |= {name: partial(implicit_gemm, *operands, config) for name, config in shipped(x, weight).items()}
    height, width = output_size(x, weight, stride, padding, dilation)
    sizes = " ".join(size_bucket(size) for size in (x.shape[0] * height * width, x.shape[1], weight.shape[0]))
    kernel = "x".join(map(str, weight.shape[2:]))
    key = (
        f"gated_conv2d forward {x.dtype} {precision(x.dtype)} {sizes} {kernel} stride={tuple(stride)} "
        f"dilation={tuple(dilation)} save={save_response}"
    )
    return candidates[tuner.choose(key, candidates, LIBRARY, x.device)]()
