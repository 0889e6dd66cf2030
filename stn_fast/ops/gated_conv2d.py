"""gated_conv2d: a 2-D convolution whose filters respond to each example's hyperparameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops import _gated_conv2d_cpu as cpu
from stn_fast.ops import _gated_conv2d_driver as driver
from stn_fast.ops._casts import cast, cast_pair
from stn_fast.ops._eager import eager_function, traced
from stn_fast.ops._gated_conv2d_driver import Geometry, Kernels, Plain
from stn_fast.ops._gated_linear_plain import Wanted
from stn_fast.ops._halves import convert
from stn_fast.ops._operands import check_operands
from stn_fast.ops._transforms import in_transform
from stn_fast.ops.gated_linear import fold
from stn_fast.ops.memory import autocast_dtype, owns_storage, plain_strides, reads_memory
from stn_fast.ops.openmp import any_team, misled, watch
from stn_fast.ops.serving import serving

IntOrPair = int | tuple[int, int] | list[int]


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    convolve = partial(F.conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
    y = convolve(x, weight, bias) + (h @ weight_gate.T)[:, :, None, None] * convolve(x, response_weight)
    if response_bias is not None and bias_gate is not None:
        y = y + ((h @ bias_gate.T) * response_bias)[:, :, None, None]
    return y.relu() if relu else y


def _kernels(backend: str) -> Kernels:
    if backend == "triton":
        from stn_fast.kernels import gated_conv2d as kernels

        return kernels
    return Plain()


@reads_memory
@any_team
def _run(*tensors: Any, geometry: Geometry, save_response: bool, choose: bool) -> tuple[Tensor, Tensor]:
    x, weight, bias, response_weight, *rest, h = tensors
    layout = driver.memory_format(x, weight)
    x, weight, response_weight = (plain_strides(tensor, layout) for tensor in (x, weight, response_weight))
    tensors = (x, weight, bias, response_weight, *rest, h)
    backend = serving(x, weight, h)
    how: dict[str, Any] = dict(geometry=geometry, save_response=save_response)
    if backend == "cpp":
        y, q = cpu.forward(*tensors, **how)
    else:
        y, q = driver.forward(_kernels(backend), *tensors, **how, choose=choose)
    return y, q if q is not None else x.new_empty(0)


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor]:
    """(y, q): q = conv(x, R) is what backward needs for the gates, and empty when nobody will ask."""
    tensors = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    geometry = Geometry(stride, padding, dilation, groups, relu)
    return _run(*tensors, geometry=geometry, save_response=save_response, choose=True)


def _compute_as_promised(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The same, with q laid out as the fake below says: a compiler relies on it, and no autotuner is asked."""
    x, h = inputs[0], inputs[7]
    if len(x) != len(h):
        raise ValueError(f"gated_conv2d: x {tuple(x.shape)} and h {tuple(h.shape)} differ in examples")
    return _run(*inputs[:8], geometry=Geometry(*inputs[8:13]), save_response=inputs[13], choose=False)


_gated_conv2d = torch.library.custom_op(
    "stn_fast::gated_conv2d",
    _compute_as_promised,
    mutates_args=(),
    schema=torch.library.infer_schema(_compute, mutates_args=()),
)


@_gated_conv2d.register_fake
def _(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h,
      stride, padding, dilation, groups, relu, save_response):  # fmt: skip
    geometry, layout = Geometry(stride, padding, dilation, groups, relu), driver.memory_format(x, weight)
    batch, outputs, pixels = x.shape[0], weight.shape[0], driver.output_pixels(x, weight, geometry)
    y = x.new_empty(batch, outputs, *pixels).contiguous(memory_format=layout)
    if not save_response:
        return y, x.new_empty(0)
    if serving(x, weight, h) == "cpp":
        q = x.new_empty(y.shape).contiguous(memory_format=cpu.plan(x, weight, geometry).inner)
        return y, q.unflatten(1, (groups, -1))
    both = x.new_empty(batch, 2 * outputs, *pixels).contiguous(memory_format=layout)
    return y, driver.response_half(both, groups)


@reads_memory
@any_team
def _compute_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    y: Tensor | None,
    q: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients, in the order of `Gradients`."""
    layout = driver.memory_format(x, weight)
    dy = dy.contiguous(memory_format=layout)
    dy, x, weight, response_weight = (plain_strides(tensor, layout) for tensor in (dy, x, weight, response_weight))
    tensors = (dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, y, q)
    geometry, backend = Geometry(stride, padding, dilation, groups, relu), serving(x, weight, h)
    if backend == "cpp":
        gradients = cpu.backward(*tensors, geometry, Wanted(*wanted))
    else:
        gradients = driver.backward(_kernels(backend), *tensors, geometry, Wanted(*wanted))
    return [gradient for gradient in gradients if gradient is not None]


def _compute_backward_apart(*inputs: Any) -> list[Tensor]:
    """The same, each gradient in memory of its own, as results of a registered operation must be."""
    gradients = _compute_backward(*inputs)
    return [gradient if owns_storage(gradient) else gradient.clone() for gradient in gradients]


_gated_conv2d_backward = torch.library.custom_op(
    "stn_fast::gated_conv2d_backward",
    _compute_backward_apart,
    mutates_args=(),
    schema=torch.library.infer_schema(_compute_backward, mutates_args=()),
)


@_gated_conv2d_backward.register_fake
def _(dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, y, q,
      stride, padding, dilation, groups, relu, wanted):  # fmt: skip
    bias = dy.new_empty(weight.shape[0])
    likes = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    return [torch.empty_like(like) for like, wants in zip(likes, wanted, strict=True) if wants]


def _setup_context(ctx, inputs, output):
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h, *geometry, _ = inputs
    y, q = output
    ctx.geometry = Geometry(*geometry)
    kept = y if ctx.geometry.relu else None
    ctx.save_for_backward(x, weight, response_weight, response_bias, weight_gate, bias_gate, h, kept, q)
    ctx.set_materialize_grads(False)


def _backward(compute, ctx, dy, _):
    wanted = list(ctx.needs_input_grad[:8])
    if dy is None or not any(wanted):
        return (None,) * 14
    gradients = iter(compute(dy, *ctx.saved_tensors, *ctx.geometry, wanted))
    return (*(next(gradients) if wants else None for wants in wanted), *[None] * 6)


_gated_conv2d.register_autograd(partial(_backward, _gated_conv2d_backward), setup_context=_setup_context)
_eager = eager_function(_compute, _setup_context, _backward, _compute_backward, _gated_conv2d_backward)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """A 2-D convolution whose filters respond to hyperparameters, every example to its own (STN, section 3.1).

    y = conv(x, W) + b + (h Gwᵀ) ⊙ conv(x, R) + (h Gbᵀ) ⊙ r, gates over whole channels; then max(y, 0) where `relu`

    Args:
        x: (B, I, H, W), contiguous or channels_last.
        weight, response_weight: W, R (O, I/groups, kh, kw). With one group they are joined to [W; R] by a copy, which
            is saved where they are stored so, as the halves of one tensor.
        bias, response_bias: b, r (O,); None for a layer without bias.
        weight_gate, bias_gate: Gw, Gb (O, n); bias_gate is None when bias is.
        h: response input, (B, n) with one row an example, or (n,) shared by all of them: then the layer is
            folded into plain filters and costs one convolution instead of two.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d; padding also "same" or "valid".
        relu: whether ReLU is applied, in the same pass over the result.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Gradients are computed for those inputs alone that require
    one. Forward-mode AD and torch.compile are supported; second derivatives in reverse mode are not, and raise.

    Returns:
        (B, O, Ho, Wo), on the device of x, of its dtype or of autocast's; channels_last where x or the filters are.

    Raises:
        ValueError: shapes, dtypes, devices or arguments do not fit together; the message names the argument.
    """
    if dtype := autocast_dtype(x):
        x, weight_gate, h = (cast(tensor, dtype) for tensor in (x, weight_gate, h))
        bias, response_bias, bias_gate = (cast(tensor, dtype) for tensor in (bias, response_bias, bias_gate))
        if x.ndim == weight.ndim == response_weight.ndim == 4 and not in_transform():
            weight, response_weight = cast_pair(weight, response_weight, dtype, driver.memory_format(x, weight))
        weight, response_weight = cast(weight, dtype), cast(response_weight, dtype)
    _check(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, groups)
    stride, dilation = pair("gated_conv2d", "stride", stride, 1), pair("gated_conv2d", "dilation", dilation, 1)
    x, padding = _explicit_padding(x, weight, padding, stride, dilation)
    _check_image(x, weight, padding, dilation)
    if h.ndim == 1 and misled(x):
        h = h.expand(len(x), -1)
    if h.ndim == 1:
        serving(x, weight, h)  # raises where a backend was asked for that can't serve
        folded, folded_bias = fold(weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
        y = F.conv2d(x, folded, folded_bias, stride, padding, dilation, groups)
        if not in_transform():
            watch(y)
        return y.relu() if relu else y
    tensors = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    if in_transform():
        return reference(*tensors, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu)
    save_response = torch.is_grad_enabled() and (h.requires_grad or weight_gate.requires_grad)
    layout = driver.memory_format(x, weight)
    x = x.contiguous(memory_format=layout)
    weight, response_weight = convert(weight, response_weight, weight.dtype, layout)
    rest = [None if t is None else t.contiguous() for t in (bias, response_bias, weight_gate, bias_gate, h)]
    operands = (x, weight, rest[0], response_weight, *rest[1:])
    run = _gated_conv2d if traced(*tensors) else _eager
    return run(*operands, stride, padding, dilation, groups, relu, save_response)[0]


def pair(who: str, name: str, value: IntOrPair, least: int) -> list[int]:
    """One number a direction, (vertical, horizontal); raises ValueError naming what is no int or pair of them."""
    both = [value, value] if isinstance(value, int) else value
    if not isinstance(both, list | tuple) or len(both) != 2 or any(not isinstance(v, int) or v < least for v in both):
        raise ValueError(f"{who} wants {name} as an int or a pair of them, at least {least}; got {value!r}")
    return list(both)


def _explicit_padding(
    x: Tensor, weight: Tensor, padding: IntOrPair | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Padding as numbers. Where 'same' is one more behind than before, x is padded by that one."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"gated_conv2d wants padding as numbers, 'same' or 'valid'; got {padding!r}")
        return x, pair("gated_conv2d", "padding", padding, 0)
    if stride != [1, 1]:
        raise ValueError(f"gated_conv2d: padding='same' wants stride 1, as in torch; got stride={stride}")
    total = [dilation[d] * (weight.shape[2 + d] - 1) for d in (0, 1)]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, [total[0] // 2, total[1] // 2]


def _check_image(x: Tensor, weight: Tensor, padding: list[int], dilation: list[int]) -> None:
    for d in (0, 1):
        available, extent = x.shape[2 + d] + 2 * padding[d], dilation[d] * (weight.shape[2 + d] - 1) + 1
        if available < extent:
            raise ValueError(
                f"gated_conv2d: x {tuple(x.shape)} with padding={padding} is smaller than the filters "
                f"{tuple(weight.shape)} with dilation={dilation}; pad more"
            )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    groups: int,
) -> None:
    together = (bias, response_bias, bias_gate)
    if any(t is None for t in together) and any(t is not None for t in together):
        raise ValueError("gated_conv2d: give bias, response_bias and bias_gate together, or none of them")
    if weight.ndim != 4 or h.ndim not in (1, 2) or x.ndim != 4:
        raise ValueError(
            "gated_conv2d wants x (B, I, H, W), weight (O, I/groups, kh, kw) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, h {tuple(h.shape)}"
        )
    outputs, n = weight.shape[0], h.shape[-1]
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"gated_conv2d: groups={groups} must be at least 1 and divide the {outputs} output channels of weight "
            f"{tuple(weight.shape)}"
        )
    wanted = {
        "x": (x, (x.shape[0], weight.shape[1] * groups, *x.shape[2:])),
        "response_weight": (response_weight, weight.shape),
        "weight_gate": (weight_gate, (outputs, n)),
        "bias": (bias, (outputs,)),
        "response_bias": (response_bias, (outputs,)),
        "bias_gate": (bias_gate, (outputs, n)),
        "h": (h, (x.shape[0], n) if h.ndim == 2 else (n,)),
    }
    check_operands("gated_conv2d", wanted, weight, x=x, weight=weight, h=h, groups=groups)
    if not weight.is_floating_point():
        raise ValueError(f"gated_conv2d wants floating point tensors; got {weight.dtype}")
