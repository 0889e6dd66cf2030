"""noise: Gaussian noise for every example at its own scale, drawn by a counter-based RNG and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stn_fast import random
from stn_fast.ops import tangents
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.draw import check_coordinates, check_strength, step_number
from stn_fast.ops.memory import address, own_address
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import ELEMENTWISE, serving
from stn_fast.ops.transforms import in_forward_mode, in_function_transform, known_sizes


def reference(x: Tensor, scale: Tensor, normal: Tensor, sizes: Sequence[int]) -> Tensor:
    """The definition, in plain torch: y = x + scale · ε, x seen as (outer, batch, inner), ε (batch, elements)."""
    scale = scale.to(x.dtype).view(1, -1, 1)
    return (x.reshape(tuple(sizes)) + scale * _arrange(normal, sizes).to(x.dtype)).view(x.shape)


def _arrange(normal: Tensor, sizes: Sequence[int]) -> Tensor:
    outer, batch, inner = sizes
    return normal.view(batch, outer, inner).transpose(0, 1)


def _normal(step: Tensor, seed: int, stream: int, first_example: int, sizes: Sequence[int]) -> Tensor:
    outer, batch, inner = sizes
    draws = random.normal(seed, step_number("noise", step), stream, batch, outer * inner, first_example)
    return torch.from_numpy(draws).to(step.device)


def _forward(
    x: Tensor, scale: Tensor, step: Tensor, seed: int, stream: int, first_example: int, sizes: list[int]
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    backend = serving(x, takes=ELEMENTWISE)
    if backend == "triton":
        from stn_fast.kernels import noise as kernels

        return kernels.noise_forward(x, scale, step, seed, stream, first_example, tuple(sizes))
    if backend == "cpp":
        from stn_fast import _C

        outer, batch, inner = sizes
        source = x.float()
        y = torch.empty_like(source)
        _C.noise_forward(
            address(source), address(scale), own_address(y), outer, batch, inner,
            first_example, seed, step_number("noise", step), stream, torch.get_num_threads(),
        )  # fmt: skip
        return y if y.dtype == x.dtype else y.to(x.dtype)
    return reference(x, scale, _normal(step, seed, stream, first_example, sizes), sizes)


def _check_sizes(x: Tensor, scale: Tensor, *rest: Any) -> None:
    sizes = rest[4]
    if x.numel() != math.prod(sizes) or len(scale) != sizes[1]:
        raise ValueError(f"noise was traced for x of {sizes} numbers; got {tuple(x.shape)}, scale {tuple(scale.shape)}")


def _fake(
    x: Tensor, scale: Tensor, step: Tensor, seed: int, stream: int, first_example: int, sizes: list[int]
) -> Tensor:
    return torch.empty_like(x)


def _backward(
    d_y: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    return [_d_scale(d_y.contiguous(), step, seed, stream, first_example, sizes)]


def _d_scale(dy: Tensor, step: Tensor, seed: int, stream: int, first_example: int, sizes: list[int]) -> Tensor:
    """d_scale[b] = Σ dy · ε, float32."""
    if dy.numel() == 0:
        return dy.new_zeros(sizes[1], dtype=torch.float32)
    backend = serving(dy, takes=ELEMENTWISE)
    if backend == "triton":
        from stn_fast.kernels import noise as kernels

        return kernels.noise_backward(dy, step, seed, stream, first_example, tuple(sizes))
    if backend == "cpp":
        from stn_fast import _C

        outer, batch, inner = sizes
        source = dy.float()
        d_scale = source.new_empty(sizes[1])
        _C.noise_backward(
            address(source), own_address(d_scale), outer, batch, inner,
            first_example, seed, step_number("noise", step), stream, torch.get_num_threads(),
        )  # fmt: skip
        return d_scale
    normal = _arrange(_normal(step, seed, stream, first_example, sizes), sizes)
    return (dy.view(tuple(sizes)) * normal).sum((0, 2)).float()


def _like(
    d_y: Tensor, step: Tensor, seed: int, stream: int, first_example: int, sizes: list[int], *_: Any
) -> list[Tensor]:
    return [d_y.new_empty(sizes[1], dtype=torch.float32)]


_operation = Operation(
    "noise",
    _forward,
    outputs=("y",),
    fake=_fake,
    backward=_backward,
    differentiable=("scale",),
    check=_check_sizes,
    fake_backward=_like,
    passed={"x": "y"},
)


def noise(
    x: Tensor,
    scale: Tensor,
    *,
    seed: int,
    step: Tensor | int,
    stream: int,
    first_example: int = 0,
    example_dim: int = 0,
) -> Tensor:
    """Additive Gaussian noise with one standard deviation per example.

    y = x + scale[b] · ε,  ε ~ N(0, 1) from (seed, step, stream, example, element)

    Differentiable with respect to x and scale; ε is drawn again in backward instead of being stored.

    Args:
        x: floating point, with at least one dimension; dimension `example_dim` counts the B examples.
        scale: (B,) float32, in units of x.
        seed, step, stream, first_example: as for `dropout`.

    Returns:
        A tensor like x.

    Raises:
        TypeError: x is not a tensor.
        ValueError: a shape, dtype or range does not fit; the message names the argument.
    """
    check_tensor("noise", "x", x)
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"noise: x must be floating point with at least one dimension, got {tuple(x.shape)} {x.dtype}")
    if not -x.ndim <= example_dim < x.ndim:
        raise ValueError(f"noise: example_dim={example_dim} is not a dimension of x {tuple(x.shape)}")
    example_dim %= x.ndim
    batch = x.shape[example_dim]
    sizes = [math.prod(x.shape[:example_dim]), batch, math.prod(x.shape[example_dim + 1 :])]
    stream = check_strength("noise", "scale", scale, x, batch, stream)
    step, seed, first_example = check_coordinates("noise", x.device, seed, step, first_example)
    draw = (step, seed, stream, first_example)
    (primal, tangent), (_, d_scale) = tangents.split(x), tangents.split(scale)
    if in_function_transform() or d_scale is not None:
        return reference(x, scale, _normal(step, seed, stream, first_example, sizes), sizes)
    with tangents.paused() if in_forward_mode() else nullcontext():
        y = _operation(primal.contiguous(), scale.contiguous(), *draw, known_sizes(sizes))
    return tangents.dual(y, tangent)
