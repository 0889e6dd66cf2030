"""gated_conv2d: a 2-D convolution whose filters respond to each example's hyperparameters."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops import tangents
from stn_fast.ops.casts import cast_pair
from stn_fast.ops.gated_conv2d import joined
from stn_fast.ops.gated_conv2d.joined import Geometry
from stn_fast.ops.gated_linear import of_sum
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
from stn_fast.ops.halves import convert
from stn_fast.ops.memory import autocast_dtype, plain_strides
from stn_fast.ops.openmp import misled, watch
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations, serving
from stn_fast.ops.transforms import in_transform

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch

implementations = Implementations(__name__)

IntOrPair = int | tuple[int, int] | list[int]


def reference(
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    weight, bias, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    convolve = partial(F.conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if projection is None:
        q = convolve(x, response_weight)
    else:
        q = F.conv2d(convolve(x, projection), response_weight, groups=groups)
    y = convolve(x, weight, bias) + (h @ weight_gate.T)[:, :, None, None] * q
    if response_bias is not None and bias_gate is not None:
        y = y + ((h @ bias_gate.T) * response_bias)[:, :, None, None]
    return y.relu() if relu else y


def _laid_out(x: Tensor, parameters: GatedParameters, layout: torch.memory_format) -> tuple[Tensor, GatedParameters]:
    """Images and filters with the strides that this layout prescribes."""
    weight, response_weight = (plain_strides(t, layout) for t in (parameters.weight, parameters.response_weight))
    projection = parameters.response_projection
    laid_out = parameters._replace(
        weight=weight,
        response_weight=response_weight,
        response_projection=None if projection is None else plain_strides(projection, layout),
    )
    return plain_strides(x, layout), laid_out


def _run(
    x: Tensor, parameters: GatedParameters, h: Tensor, geometry: Geometry, save_response: bool, choose: bool
) -> tuple[Tensor, Tensor]:
    """(y, q): q = conv(x, R) is what backward needs for the gates, and empty when nobody will ask.

    Of a response of low rank, u = conv(x, B) is in the place of q.
    """
    x, parameters = _laid_out(x, parameters, joined.memory_format(x, parameters.weight))
    module = implementations.serving(x, parameters.weight, parameters.response_weight, h)
    y, q = module.forward(x, parameters, h, geometry, save_response, choose)
    return y, q if q is not None else x.new_empty(0)


def _forward(
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor]:
    return _run(x, parameters, h, Geometry(stride, padding, dilation, groups, relu), save_response, True)


def _forward_as_promised(x: Tensor, parameters: GatedParameters, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same, with q laid out as `_fake` says: a compiler relies on it, and no autotuner is asked."""
    *geometry, save_response = rest
    return _run(x, parameters, h, Geometry(*geometry), save_response, False)


def _check_sizes(x: Tensor, parameters: GatedParameters, h: Tensor, *rest: Any) -> None:
    if len(x) != len(h):
        raise ValueError(f"gated_conv2d: x {tuple(x.shape)} and h {tuple(h.shape)} differ in examples")


def _fake(x: Tensor, parameters: GatedParameters, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *of_geometry, save_response = rest
    geometry, weight = Geometry(*of_geometry), parameters.weight
    layout, groups = joined.memory_format(x, weight), geometry.groups
    batch, outputs, pixels = x.shape[0], weight.shape[0], joined.output_pixels(x, weight, geometry)
    y = x.new_empty(batch, outputs, *pixels).contiguous(memory_format=layout)
    if not save_response:
        return y, x.new_empty(0)
    if parameters.response_projection is not None:
        u = x.new_empty(batch, len(parameters.response_projection), *pixels)
        return y, u.contiguous(memory_format=layout)
    if serving(x, weight, h) == "cpp":
        from stn_fast.ops.gated_conv2d import cpu

        q = x.new_empty(y.shape).contiguous(memory_format=cpu.plan(x, weight, geometry).inner)
        return y, q.unflatten(1, (groups, -1))
    both = x.new_empty(batch, 2 * outputs, *pixels).contiguous(memory_format=layout)
    return y, joined.response_half(both, groups)


def _backward(
    d_y: Tensor,
    x: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    y: Tensor | None,
    q: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    wanted: list[bool],
) -> Gradients:
    layout = joined.memory_format(x, parameters.weight)
    x, parameters = _laid_out(x, parameters, layout)
    d_y = plain_strides(d_y.contiguous(memory_format=layout), layout)
    module = implementations.serving(x, parameters.weight, parameters.response_weight, h)
    return module.backward(
        d_y, x, parameters, h, y, q, Geometry(stride, padding, dilation, groups, relu), Wanted(*wanted)
    )


_operation = Operation(
    "gated_conv2d",
    _forward,
    outputs=("y", "q"),
    fake=_fake,
    backward=_backward,
    differentiable=("x", "parameters", "h"),
    check=_check_sizes,
    promised=_forward_as_promised,
    kept_if={"y": "relu"},
    library=True,
)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    hyper: HyperBatch | Tensor,
    *,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    relu: bool = False,
    response_projection: Tensor | None = None,
) -> Tensor:
    """A 2-D convolution whose filters respond to hyperparameters, every example to its own (STN, section 3.1).

    y = conv(x, W) + b + (h Gwᵀ) ⊙ conv(x, R) + (h Gbᵀ) ⊙ r, gates over whole channels; then max(y, 0) where `relu`

    Args:
        x: (B, I, H, W), contiguous or channels_last.
        weight, response_weight: W, R (O, I/groups, kh, kw). With one group they are joined to [W; R] by a copy, which
            is saved where they are stored so, as the halves of one tensor.
        bias, response_bias: b, r (O,); None for a layer without bias.
        weight_gate, bias_gate: Gw, Gb (O, n); bias_gate is None when bias is.
        hyper: a HyperBatch, or its response input h, (B, n) with one row an example, or (n,) shared by all of them:
            then the layer is folded into plain filters and costs one convolution instead of two.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d; padding also "same" or "valid".
        relu: whether ReLU is applied, in the same pass over the result.
        response_projection: B (groups·k, I/groups, kh, kw) of a response of rank k in each group, conv(x, R) =
            conv(conv(x, B), A), whose A (O, k, 1, 1) is response_weight. None if response_weight is R.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Gradients are computed only for inputs that require
    one. Forward-mode AD and torch.compile are supported; second derivatives in reverse mode are not, and raise.

    Returns:
        (B, O, Ho, Wo), on the device of x, of its dtype or of autocast's; channels_last where x or the filters are.

    Raises:
        ValueError: shapes, dtypes, devices or arguments do not fit together; the message names the argument.
    """
    parameters = GatedParameters(
        weight, bias, response_weight, response_bias, weight_gate, bias_gate, response_projection
    )
    check_parameters("gated_conv2d", parameters)
    h = response_input(hyper, weight)
    direction = tangents.direction_of(hyper, *parameters)
    h = h if direction is None else direction
    check_examples("gated_conv2d", x, hyper)
    if dtype := autocast_dtype(x):
        x = x.to(dtype)
        pair_of_filters = x.ndim == weight.ndim == response_weight.ndim == 4 and response_projection is None
        if pair_of_filters and not in_transform():
            filters = cast_pair(weight, response_weight, dtype, joined.memory_format(x, weight))
            parameters = parameters._replace(weight=filters[0], response_weight=filters[1])
        parameters, h = parameters.to(dtype), h.to(dtype)
    _check(x, parameters, h, groups)
    stride, dilation = pair("gated_conv2d", "stride", stride, 1), pair("gated_conv2d", "dilation", dilation, 1)
    x, padding = _explicit_padding(x, parameters.weight, padding, stride, dilation)
    _check_image(x, parameters.weight, padding, dilation)
    if direction is not None:
        return _dual(x, parameters, h, Geometry(stride, padding, dilation, groups, relu))
    if h.ndim == 1 and (misled(x) or (rows_are_cheaper(h, parameters) and not tangents.is_centred(hyper))):
        h = h.expand(len(x), -1)
    if h.ndim == 1:
        implementations.check(x, parameters.weight, h)
        plain = (parameters.weight, parameters.bias) if tangents.is_centred(hyper) else fold(parameters, h)
        y = F.conv2d(x, *plain, stride, padding, dilation, groups)
        if not in_transform():
            watch(y)
        return y.relu() if relu else y
    if in_transform():
        return reference(x, parameters, h, stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu)
    layout = joined.memory_format(x, parameters.weight)
    weight, bias, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    if projection is None:
        weight, response_weight = convert(weight, response_weight, weight.dtype, layout)
    else:
        weight, response_weight, projection = (
            filters.contiguous(memory_format=layout) for filters in (weight, response_weight, projection)
        )
    save_response = response_is_read(h, parameters)
    bias, response_bias, *gates = contiguous(bias, response_bias, weight_gate, bias_gate)
    filters_and_gates = (weight, bias, response_weight, response_bias, *gates, projection)
    operands = (x.contiguous(memory_format=layout), *filters_and_gates, h.contiguous())
    return _operation(*operands, stride, padding, dilation, groups, relu, save_response)[0]


def _dual(x: Tensor, parameters: GatedParameters, direction: Tensor, geometry: Geometry) -> Tensor:
    """conv(x, W) + b, with its tangent along a change of h from 0."""
    weight, bias, response_weight, _, _, _, projection = parameters
    *options, groups, relu = geometry
    x, dx = tangents.split(x)
    if misled(x):
        raise RuntimeError(
            "gated_conv2d: OpenMP starts fewer threads than torch expects, and torch's convolutions, of which tangents "
            "are made, would be wrong: call torch.set_num_threads(1)"
        )

    def rows(y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1).flatten(0, 2)

    with tangents.paused():
        convolve = partial(F.conv2d, stride=options[0], padding=options[1], dilation=options[2], groups=groups)
        z, q = convolve(x, weight, bias), convolve(x, response_weight if projection is None else projection)
        if projection is not None:
            q = F.conv2d(q, response_weight, groups=groups)
        p = None if dx is None else convolve(dx, weight)
        (batch, _, *pixels), inner = z.shape, z.shape[2] * z.shape[3]
        dz = gated_sum(rows(q), *of_sum(parameters), direction, None if p is None else rows(p), inner=inner)
        dz = dz.view(batch, *pixels, len(weight)).permute(0, 3, 1, 2)
        watch(z, q, *(() if p is None else (p,)))
        if relu:
            z = z.relu()
            dz = torch.ops.aten.threshold_backward(dz, z, 0)
    return tangents.dual(z, dz)


def pair(who: str, name: str, value: IntOrPair, least: int) -> list[int]:
    """One number a direction, (vertical, horizontal); raises ValueError naming what is no int or pair of them."""
    both = [value, value] if isinstance(value, int) else value
    if not isinstance(both, list | tuple) or len(both) != 2 or any(not isinstance(v, int) or v < least for v in both):
        raise ValueError(f"{who} takes {name} as an int or a pair of them, at least {least}; got {value!r}")
    return list(both)


def _explicit_padding(
    x: Tensor, weight: Tensor, padding: IntOrPair | str, stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Padding as numbers. Where 'same' is one more behind than before, x is padded by that one."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        if isinstance(padding, str):
            raise ValueError(f"gated_conv2d takes padding as numbers, 'same' or 'valid'; got {padding!r}")
        return x, pair("gated_conv2d", "padding", padding, 0)
    if stride != [1, 1]:
        raise ValueError(f"gated_conv2d: padding='same' needs stride 1, as in torch; got stride={stride}")
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


def _check(x: Tensor, parameters: GatedParameters, h: Tensor, groups: int) -> None:
    weight = parameters.weight
    if weight.ndim != 4 or h.ndim not in (1, 2) or x.ndim != 4:
        raise ValueError(
            "gated_conv2d takes x (B, I, H, W), weight (O, I/groups, kh, kw) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, h {tuple(h.shape)}"
        )
    outputs, n = weight.shape[0], h.shape[-1]
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"gated_conv2d: groups={groups} must be at least 1 and divide the {outputs} output channels of weight "
            f"{tuple(weight.shape)}"
        )
    operands = (
        ("x", x, (x.shape[0], weight.shape[1] * groups, *x.shape[2:])),
        *expected(parameters, weight.shape, outputs, n, groups=groups),
        ("h", h, (x.shape[0], n) if h.ndim == 2 else (n,)),
    )
    check_operands("gated_conv2d", operands, weight, x=x, weight=weight, h=h, groups=groups)
