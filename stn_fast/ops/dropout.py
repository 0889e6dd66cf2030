"""dropout: every example has its own rate; masks are drawn by a counter-based RNG and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stn_fast import random
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.draw import check_coordinates, check_strength, step_number
from stn_fast.ops.memory import address, own_address
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import ELEMENTWISE, serving
from stn_fast.ops.tangents import of_linear
from stn_fast.ops.transforms import in_forward_mode, in_function_transform, known_sizes


def reference(x: Tensor, rate: Tensor, uniform: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The definition, in plain torch: y = x · [u ≥ rate] / (1 − rate), u looked up by element.

    x is seen as (outer, batch, middle, last); uniform (batch, elements) holds u, and position (i, b, j, k) reads
    element i·strides[0] + j·strides[1] + k·strides[2] of example b.
    """
    outer, batch, middle, last = sizes
    steps = (torch.arange(size, device=x.device) * s for size, s in zip((outer, middle, last), strides, strict=True))
    i, j, k = steps
    element = (i[:, None, None] + j[:, None] + k).view(outer, 1, middle, last).expand(sizes)
    example = torch.arange(batch, device=x.device).view(1, -1, 1, 1)
    rate = rate.view(1, -1, 1, 1)
    keep = uniform[example, element] >= rate
    scale = torch.where(keep, 1 / (1 - rate.double()), 0).to(x.dtype)
    # x is also selected before the product: a dropped x may be infinite, and `where` differentiates both branches.
    return (torch.where(keep, x.reshape(tuple(sizes)), 0) * scale).view(x.shape)


def _uniform(
    step: Tensor, seed: int, stream: int, first_example: int, sizes: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """u (batch, elements) of every distinct element that the strides reach, from the NumPy generator."""
    outer, batch, middle, last = sizes
    elements = 1 + sum((size - 1) * stride for size, stride in zip((outer, middle, last), strides, strict=True))
    draws = random.uniform(seed, step_number("dropout", step), stream, batch, elements, first_example)
    return torch.from_numpy(draws).to(step.device)


def _forward(
    x: Tensor,
    rate: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: list[int],
    strides: list[int],
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    backend = serving(x, takes=ELEMENTWISE)
    if backend == "triton":
        from stn_fast.kernels import dropout as kernels

        return kernels.dropout(x, rate, step, seed, stream, first_example, tuple(sizes), tuple(strides))
    if backend == "cpp":
        from stn_fast import _C

        outer, batch, middle, last = sizes
        e_outer, e_middle, e_last = strides
        source = x.float()
        y = torch.empty_like(source)
        _C.dropout(
            address(source), address(rate), own_address(y), outer, batch, middle, last, e_outer, e_middle, e_last,
            first_example, seed, step_number("dropout", step), stream, torch.get_num_threads(),
        )  # fmt: skip
        return y if y.dtype == x.dtype else y.to(x.dtype)
    return reference(x, rate, _uniform(step, seed, stream, first_example, sizes, strides), sizes, strides)


def _check_sizes(x: Tensor, rate: Tensor, *rest: Any) -> None:
    sizes = rest[4]
    if x.numel() != math.prod(sizes) or len(rate) != sizes[1]:
        raise ValueError(f"dropout was traced for x of {sizes} numbers; got {tuple(x.shape)}, rate {tuple(rate.shape)}")


def _fake(
    x: Tensor,
    rate: Tensor,
    step: Tensor,
    seed: int,
    stream: int,
    first_example: int,
    sizes: list[int],
    strides: list[int],
) -> Tensor:
    return torch.empty_like(x)


# The rate and the step never require a gradient (see `dropout`), and x and dy have the same mask.
_operation = Operation("dropout", _forward, outputs=("y",), fake=_fake, check=_check_sizes)


def mask_layout(shape: Sequence[int], example_dim: int, shared_dims: Sequence[int]) -> tuple[list[int], list[int]]:
    """Collapses a shape into sizes (outer, batch, middle, last) and the element strides of the other three.

    An element is numbered row by row over the dimensions that are not shared; shared dimensions get stride 0.

    Raises:
        ValueError: a dimension is out of range or counts examples and is shared, or the shared dimensions
            alternate with others too often to fit the four groups.
    """
    ndim = len(shape)
    if not -ndim <= example_dim < ndim:
        raise ValueError(f"example_dim={example_dim} is not a dimension of shape {tuple(shape)}")
    if any(not -ndim <= dim < ndim for dim in shared_dims):
        raise ValueError(f"shared_dims={tuple(shared_dims)} are not all dimensions of shape {tuple(shape)}")
    example_dim %= ndim
    shared = {dim % ndim for dim in shared_dims}
    if example_dim in shared:
        raise ValueError(f"the example dimension {example_dim} can't be one of shared_dims={tuple(shared_dims)}")

    def groups(dims: range, most: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        for dim in dims:
            is_shared = dim in shared
            if shape[dim] == 1:
                continue
            if found and found[-1][1] == is_shared:
                found[-1] = (found[-1][0] * shape[dim], is_shared)
            else:
                found.append((shape[dim], is_shared))
        if len(found) > most:
            raise ValueError(
                f"shared_dims={tuple(shared_dims)} of shape {tuple(shape)} split it into too many groups: one before "
                "the example dimension and two after it are supported; permute x so that shared dimensions adjoin"
            )
        return [(1, False)] * (most - len(found)) + found

    collapsed = [*groups(range(example_dim), 1), *groups(range(example_dim + 1, ndim), 2)]
    strides: list[int] = []
    element = 1
    for size, is_shared in reversed(collapsed):
        strides.insert(0, 0 if is_shared else element)
        element *= 1 if is_shared else size
    outer, middle, last = (size for size, _ in collapsed)
    return [outer, shape[example_dim], middle, last], strides


def dropout(
    x: Tensor,
    rate: Tensor,
    *,
    seed: int,
    step: Tensor | int,
    stream: int,
    first_example: int = 0,
    example_dim: int = 0,
    shared_dims: Sequence[int] = (),
) -> Tensor:
    """Inverted dropout with one rate per example.

    y = x · keep / (1 − rate[b]),  keep = [u ≥ rate[b]],  u ~ U[0, 1) from (seed, step, stream, example, element)

    Nothing is stored for backward: dx is the same function of dy, with the same mask drawn again. A dropped element is
    exactly 0, even at rate 1. The mask is not differentiable in the rate, so the rate must not require a gradient.

    Args:
        x: floating point, with at least one dimension; dimension `example_dim` counts the B examples.
        rate: (B,) float32, in [0, 1]; not checked, which would wait for the device. 1 or more drops everything.
        seed, step: with the stream, fix the draws; step may be a 0-dim int64 tensor on x's device.
        stream: number of the random stream, at least 1 and different for every layer that draws at the same step.
        first_example: index of the first example in the global batch.
        shared_dims: dimensions that share one mask: (-2, -1) of (B, C, H, W) drops whole channels, the time dimension
            locks the mask over time (variational dropout).

    Returns:
        A tensor like x.

    Raises:
        TypeError: x is not a tensor.
        ValueError: a shape, dtype, seed, step or stream is wrong, or rate requires grad; the message names it.
    """
    check_tensor("dropout", "x", x)
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(
            f"dropout: x must be floating point with at least one dimension, got {tuple(x.shape)} {x.dtype}"
        )
    sizes, strides = mask_layout(x.shape, example_dim, shared_dims)
    stream = check_strength("dropout", "rate", rate, x, sizes[1], stream)
    step, seed, first_example = check_coordinates("dropout", x.device, seed, step, first_example)
    if rate.requires_grad:
        raise ValueError(
            "dropout: rate requires grad, but a mask has no gradient: sample hyperparameters with location.detach() in "
            "a training step, and apply no dropout in a validation step, as its layers do in eval mode"
        )
    draw = (rate.contiguous(), step, seed, stream, first_example)
    if in_function_transform():
        return reference(x, rate, _uniform(step, seed, stream, first_example, sizes, strides), sizes, strides)

    def drop(x: Tensor) -> Tensor:
        return _operation(x.contiguous(), *draw, known_sizes(sizes), known_sizes(strides))

    return of_linear(drop, x) if in_forward_mode() else drop(x)
