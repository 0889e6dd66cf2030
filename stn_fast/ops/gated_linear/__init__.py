"""gated_linear: a linear layer whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stn_fast.ops import tangents
from stn_fast.ops.gated_linear import plain
from stn_fast.ops.gated_sum import gated_sum
from stn_fast.ops.gates import (
    GatedParameters,
    Gradients,
    Wanted,
    check_examples,
    check_operands,
    check_parameters,
    contiguous,
    expected,
    fold,
    response_input,
    response_is_read,
    rows_are_cheaper,
)
from stn_fast.ops.linear import linear
from stn_fast.ops.memory import autocast_dtype
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations
from stn_fast.ops.transforms import in_transform

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch

implementations = Implementations(__name__)


def reference(x: Tensor, parameters: GatedParameters, h: Tensor, outer: int = 1, inner: int = 1) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it.

    Rows of x (outer·B·inner, I) are positions; row m belongs to example (m // inner) mod B of h (B, n).
    """
    return plain.forward(x, parameters, h, outer, inner, True)[0]


def _forward(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> tuple[Tensor, Tensor]:
    """(y, saved): x Rᵀ, or u = x Bᵀ of a response of low rank, is what backward needs; empty when nobody will ask."""
    module = implementations.serving(x, parameters.weight, parameters.response_weight, h)
    y, saved = module.forward(x, parameters, h, outer, inner, save_response)
    return y, saved if save_response else x.new_empty(0)


def _fake(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], parameters.weight.shape[0])
    if not save_response:
        return y, x.new_empty(0)
    projection = parameters.response_projection
    return y, torch.empty_like(y) if projection is None else x.new_empty(x.shape[0], projection.shape[0])


def _backward(
    d_y: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    saved: Tensor,
    outer: int,
    inner: int,
    wanted: list[bool],
) -> Gradients:
    module = implementations.serving(x, parameters.weight, parameters.response_weight, h)
    return module.backward(d_y.contiguous(), x, parameters, h, saved, outer, inner, Wanted(*wanted))


def _check_sizes(
    x: Tensor, parameters: GatedParameters, h: Tensor, outer: int, inner: int, save_response: bool
) -> None:
    if len(x) != outer * len(h) * inner:
        raise ValueError(f"gated_linear: x {tuple(x.shape)} is not {outer} x {inner} positions of h {tuple(h.shape)}")


_operation = Operation(
    "gated_linear",
    _forward,
    outputs=("y", "saved"),
    fake=_fake,
    backward=_backward,
    differentiable=("x", "parameters", "h"),
    check=_check_sizes,
)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    hyper: HyperBatch | Tensor,
    example_dim: int = 0,
    *,
    response_projection: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weights respond to hyperparameters, every example to its own (STN, section 3.1).

    y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r

    Args:
        x: (..., I); dimension `example_dim` counts the B examples, all others are positions of an example.
        weight, response_weight: W, R (O, I).
        bias, response_bias: b, r (O,); None for a layer without bias.
        weight_gate, bias_gate: Gw, Gb (O, n); bias_gate is None when bias is.
        hyper: a HyperBatch, or its response input h, (B, n) with one row an example, or (n,) shared by all of them:
            then the layer is folded into plain weights and costs one product instead of two.
        example_dim: the dimension of x that counts examples.
        response_projection: B (k, I) of a response R = A B of rank k, whose A (O, k) is response_weight. It costs
            k (I + O) multiplications per position instead of I O. None if response_weight is R.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Accumulation is in float32 for the 16-bit ones on CUDA.
    Gradients are computed only for inputs that require one. Forward-mode AD and torch.compile are supported;
    second derivatives in reverse mode are not, and raise.

    Returns:
        (..., O), on the device of x, of its dtype or of autocast's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    parameters = GatedParameters(
        weight, bias, response_weight, response_bias, weight_gate, bias_gate, response_projection
    )
    check_parameters("gated_linear", parameters)
    h = response_input(hyper, weight)
    direction = tangents.direction_of(hyper, *parameters)
    h = h if direction is None else direction
    check_examples("gated_linear", x, hyper, example_dim, range(x.ndim - 1))
    if dtype := autocast_dtype(x):
        x, parameters, h = x.to(dtype), parameters.to(dtype), h.to(dtype)
    _check(x, parameters, h, example_dim)
    example_dim %= x.ndim
    if direction is not None:
        return _dual(x, parameters, h, example_dim)
    if tangents.is_centred(hyper):
        implementations.check(x, weight, h)
        return linear(x, parameters.weight, parameters.bias)
    if h.ndim == 1 and rows_are_cheaper(h, parameters):
        h = h.expand(x.shape[example_dim], -1)
    if h.ndim == 1:
        implementations.check(x, parameters.weight, h)
        return linear(x, *fold(parameters, h))
    outer, inner = math.prod(x.shape[:example_dim]), math.prod(x.shape[example_dim + 1 : -1])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if in_transform():
        y = reference(rows, parameters, h, outer, inner)
    else:
        save_response = response_is_read(h, parameters)
        y, _ = _operation(*contiguous(rows, *parameters, h), outer, inner, save_response)
    return y.view(*x.shape[:-1], parameters.weight.shape[0])


def _dual(x: Tensor, parameters: GatedParameters, direction: Tensor, example_dim: int) -> Tensor:
    """x Wᵀ + b, with its tangent along a change of h from 0."""
    x, dx = tangents.split(x)
    outer, inner = math.prod(x.shape[:example_dim]), math.prod(x.shape[example_dim + 1 : -1])
    with tangents.paused():
        z = linear(x, parameters.weight, parameters.bias)
        q = response(x, parameters).flatten(0, -2)
        p = None if dx is None else linear(dx, parameters.weight).flatten(0, -2)
        dz = gated_sum(q, *of_sum(parameters), direction, p, outer=outer, inner=inner)
    return tangents.dual(z, dz.view_as(z))


def response(x: Tensor, parameters: GatedParameters) -> Tensor:
    """x Rᵀ by plain products."""
    projection = parameters.response_projection
    return linear(x if projection is None else linear(x, projection), parameters.response_weight)


def of_sum(parameters: GatedParameters) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gw, r and Gb, as `gated_sum` takes them."""
    return parameters.weight_gate, parameters.response_bias, parameters.bias_gate


def _check(x: Tensor, parameters: GatedParameters, h: Tensor, example_dim: int) -> None:
    weight = parameters.weight
    if weight.ndim != 2 or h.ndim not in (1, 2) or x.ndim < 2:
        raise ValueError(
            "gated_linear takes x (..., I) of at least two dimensions, weight (O, I) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, h {tuple(h.shape)}"
        )
    if not -x.ndim <= example_dim < x.ndim or example_dim % x.ndim == x.ndim - 1:
        raise ValueError(
            f"gated_linear: example_dim={example_dim} must name a dimension of x {tuple(x.shape)} other than the last"
        )
    (outputs, inputs), n = weight.shape, h.shape[-1]
    operands = (
        ("x", x, (*x.shape[:-1], inputs)),
        *expected(parameters, weight.shape, outputs, n),
        ("h", h, (x.shape[example_dim], n) if h.ndim == 2 else (n,)),
    )
    check_operands("gated_linear", operands, weight, x=x, weight=weight, h=h, example_dim=example_dim)
