"""gated_linear: a linear layer whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stn_fast.ops._casts import cast
from stn_fast.ops._eager import eager_function, register, traced
from stn_fast.ops._gated_linear_cpu import backward_core, forward_core
from stn_fast.ops._gated_linear_plain import Wanted, backward_plain, forward_plain
from stn_fast.ops._linear import linear
from stn_fast.ops._operands import check_operands
from stn_fast.ops._transforms import in_transform
from stn_fast.ops.memory import autocast_dtype, reads_memory
from stn_fast.ops.serving import serving


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int = 1,
    inner: int = 1,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it.

    Rows of x (outer·B·inner, I) are positions; row m belongs to example (m // inner) mod B of h (B, n).
    """
    return forward_plain(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, outer, inner)[0]


def fold(
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The plain layer that a gated one is at a single h (n,): (W + diag(Gw h) R, b + (Gb h) ⊙ r); W, R (O, ...)."""
    folded = torch.addcmul(weight, (weight_gate @ h).view(-1, *[1] * (weight.ndim - 1)), response_weight)
    if bias is None or response_bias is None or bias_gate is None:
        return folded, None
    return folded, bias + (bias_gate @ h) * response_bias


def _backend(x: Tensor, weight: Tensor, h: Tensor) -> str:
    backend = serving(x, weight, h)
    if backend == "triton":
        from stn_fast.kernels.gates import MAX_N

        if h.shape[-1] > MAX_N:
            many = f"its kernels take at most {MAX_N} hyperparameters, and h has {h.shape[-1]}"
            return serving(x, weight, h, without={"triton": many})
    return backend


@reads_memory
def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
    save_response: bool,
) -> tuple[Tensor, Tensor]:
    """(y, q): q = x Rᵀ is what backward needs for the gates, and empty when nobody will ask."""
    tensors = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    backend = _backend(x, weight, h)
    if backend == "triton":
        from stn_fast.kernels import gated_linear as kernels

        y, q = kernels.forward(*tensors, outer, inner, save_response)
    else:
        y, q = (forward_core if backend == "cpp" else forward_plain)(*tensors, outer, inner)
    return y, q if save_response and q is not None else x.new_empty(0)


def _check_sizes(x: Tensor, *rest: Any) -> None:
    h, outer, inner, _ = rest[6:]
    if len(x) != outer * len(h) * inner:
        raise ValueError(f"gated_linear: x {tuple(x.shape)} is not {outer} x {inner} positions of h {tuple(h.shape)}")


_gated_linear = register("gated_linear", _compute, _check_sizes)


@_gated_linear.register_fake
def _(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, outer, inner, save_response):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if save_response else x.new_empty(0)


@reads_memory
def _compute_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor,
    outer: int,
    inner: int,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients, in the order of `Gradients`."""
    asked = Wanted(*wanted)
    dy = dy.contiguous()
    backend = _backend(x, weight, h)
    tensors = (dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q)
    if backend == "triton":
        from stn_fast.kernels import gated_linear as kernels

        gradients = kernels.backward(*tensors, outer, inner, asked)
    else:
        gradients = (backward_core if backend == "cpp" else backward_plain)(*tensors, outer, inner, asked)
    return [gradient for gradient in gradients if gradient is not None]


_gated_linear_backward = torch.library.custom_op("stn_fast::gated_linear_backward", _compute_backward, mutates_args=())


@_gated_linear_backward.register_fake
def _(dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q, outer, inner, wanted):
    bias = dy.new_empty(weight.shape[0])
    likes = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    return [torch.empty_like(like) for like, wants in zip(likes, wanted, strict=True) if wants]


def _setup_context(ctx, inputs, output):
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h, ctx.outer, ctx.inner, _ = inputs
    _, q = output
    ctx.save_for_backward(x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q)
    ctx.set_materialize_grads(False)


def _backward(compute, ctx, dy, _):
    wanted = list(ctx.needs_input_grad[:8])
    if dy is None or not any(wanted):
        return (None,) * 11
    gradients = iter(compute(dy, *ctx.saved_tensors, ctx.outer, ctx.inner, wanted))
    return (*(next(gradients) if wants else None for wants in wanted), None, None, None)


_gated_linear.register_autograd(partial(_backward, _gated_linear_backward), setup_context=_setup_context)
_eager = eager_function(_compute, _setup_context, _backward, _compute_backward, _gated_linear_backward)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    *,
    example_dim: int = 0,
) -> Tensor:
    """A linear layer whose weights respond to hyperparameters, every example to its own (STN, section 3.1).

    y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r

    Args:
        x: (..., I); dimension `example_dim` counts the B examples, all others are positions of an example.
        weight, response_weight: W, R (O, I).
        bias, response_bias: b, r (O,); None for a layer without bias.
        weight_gate, bias_gate: Gw, Gb (O, n); bias_gate is None when bias is.
        h: response input, (B, n) with one row an example, or (n,) shared by all of them: then the layer is
            folded into plain weights and costs one product instead of two.
        example_dim: the dimension of x that counts examples.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Accumulation is in float32 for the 16-bit ones on CUDA.
    Gradients are computed for those inputs alone that require one. Forward-mode AD and torch.compile are supported;
    second derivatives in reverse mode are not, and raise.

    Returns:
        (..., O), on the device of x, of its dtype or of autocast's.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    if dtype := autocast_dtype(x):
        x, weight, response_weight, weight_gate, h = (
            cast(tensor, dtype) for tensor in (x, weight, response_weight, weight_gate, h)
        )
        bias, response_bias, bias_gate = (cast(tensor, dtype) for tensor in (bias, response_bias, bias_gate))
    _check(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, example_dim)
    if h.ndim == 1:
        _backend(x, weight, h)  # raises where one was asked for that can't serve
        folded, folded_bias = fold(weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
        return linear(x, folded, folded_bias)
    example_dim %= x.ndim
    outer, inner = math.prod(x.shape[:example_dim]), math.prod(x.shape[example_dim + 1 : -1])
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if in_transform():
        y = reference(rows, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, outer, inner)
    else:
        save_response = torch.is_grad_enabled() and (h.requires_grad or weight_gate.requires_grad)
        tensors = (rows, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
        run = _gated_linear if traced(*tensors) else _eager
        y, _ = run(*(None if t is None else t.contiguous() for t in tensors), outer, inner, save_response)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    example_dim: int,
) -> None:
    group = (bias, response_bias, bias_gate)
    if any(t is None for t in group) and any(t is not None for t in group):
        raise ValueError("gated_linear: give bias, response_bias and bias_gate together, or none of them")
    if weight.ndim != 2 or h.ndim not in (1, 2) or x.ndim < 2:
        raise ValueError(
            "gated_linear wants x (..., I) of at least two dimensions, weight (O, I) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, h {tuple(h.shape)}"
        )
    if not -x.ndim <= example_dim < x.ndim or example_dim % x.ndim == x.ndim - 1:
        raise ValueError(
            f"gated_linear: example_dim={example_dim} must name a dimension of x {tuple(x.shape)} other than the last"
        )
    outputs, inputs = weight.shape
    n = h.shape[-1]
    wanted = {
        "x": (x, (*x.shape[:-1], inputs)),
        "response_weight": (response_weight, (outputs, inputs)),
        "weight_gate": (weight_gate, (outputs, n)),
        "bias": (bias, (outputs,)),
        "response_bias": (response_bias, (outputs,)),
        "bias_gate": (bias_gate, (outputs, n)),
        "h": (h, (x.shape[example_dim], n) if h.ndim == 2 else (n,)),
    }
    check_operands("gated_linear", wanted, weight, x=x, weight=weight, h=h, example_dim=example_dim)
    if not weight.is_floating_point():
        raise ValueError(f"gated_linear wants floating point tensors; got {weight.dtype}")
