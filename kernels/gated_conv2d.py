"""Gated convolutions on a GPU: y = conv(x, W) + scale ⊙ conv(x, R) + shift, gates over whole channels of an example.

Two ways forward, and the autotuner chooses: one library convolution with the filters [W; R] and a fused pass beside
it ("library"), or one Triton kernel for all of it. Backward, the convolutions are the library's, on the gradients
of both branches that one fused pass leaves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autotune import Problem, tuner
from .gated_conv2d_backward import epilogue_backward, epilogue_partials
from .gated_conv2d_epilogue import epilogue_forward
from .gated_conv2d_gates import gates, gates_backward
from .gated_conv2d_implicit import implicit_gemm, output_size, precision, shipped
from .gates import MAX_N
from .launch import device_guard

__all__ = [
    "MAX_N",
    "choose_forward",
    "epilogue_backward",
    "epilogue_forward",
    "epilogue_partials",
    "gates",
    "gates_backward",
    "implicit_gemm",
]

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
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not channels_last or groups != 1 or x.shape[1] < LEAST_CHANNELS:
        return library()
    configs = shipped(x, weight)
    operands = (x, weight, response_weight, scale, shift, stride, padding, dilation, relu, save_response)

    def run(name: str) -> Result:
        return library() if name == LIBRARY else implicit_gemm(*operands, configs[name])

    height, width = output_size(x, weight, stride, padding, dilation)
    operation = ("gated_conv2d forward", x.dtype, precision(x.dtype), "x".join(map(str, weight.shape[2:])))
    moves = (f"stride={'x'.join(map(str, stride))}", f"dilation={'x'.join(map(str, dilation))}")
    sizes = (x.shape[0] * height * width, x.shape[1], weight.shape[0])
    problem = Problem((*operation, *moves, f"save={save_response}"), sizes)
    with device_guard(x):
        return run(tuner.choose(problem, (LIBRARY, *configs), run, LIBRARY, x.device))
