"""gated_lstm: one layer of an LSTM, in one direction, whose weights respond to each example's hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stn_fast.ops import gated_linear, tangents
from stn_fast.ops.gated_lstm import over_time
from stn_fast.ops.gated_lstm.over_time import Saved
from stn_fast.ops.gated_lstm.tangent import dual_lstm
from stn_fast.ops.gates import (
    GatedParameters,
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
from stn_fast.ops.memory import autocast_dtype
from stn_fast.ops.openmp import misled, watch
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations
from stn_fast.ops.transforms import in_transform

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch

implementations = Implementations(__name__)

State = tuple[Tensor, Tensor]


def reference(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    h: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    states, (hidden, cell) = [], (h_0, c_0)
    for x_t in x.unbind(0)[:: -1 if reverse else 1]:
        before = gated_linear.reference(x_t, from_input, h) + gated_linear.reference(hidden, from_hidden, h)
        i, f, g, o = before.chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        states.append(hidden)
    return torch.stack(states[:: -1 if reverse else 1]), (hidden, cell)


def _forward(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    h: Tensor,
    reverse: bool,
    save: bool,
    save_response: bool,
) -> tuple[Tensor, ...]:
    """(y, c_n, *Saved), what is saved having no time step where nobody will ask."""
    y, c_n, saved = over_time.forward(
        implementations.serving(x, h_0, h), x, h_0, c_0, from_input, from_hidden, h,
        reverse=reverse, save=save, save_response=save_response,
    )  # fmt: skip
    if saved is None:
        batch, hidden = h_0.shape
        saved = Saved(*(x.new_empty(0, batch, width) for width in (4 * hidden, hidden, 4 * hidden, 4 * hidden)))
    return y, c_n, *saved


def _response_width(weights: GatedParameters) -> int:
    """Of what is kept of a response: x Rᵀ, or of low rank x Bᵀ."""
    return len(weights.weight if weights.response_projection is None else weights.response_projection)


def _check_sizes(x: Tensor, h_0: Tensor, c_0: Tensor, *rest: Any) -> None:
    h = rest[2]
    if not x.shape[1] == len(h_0) == len(c_0) == len(h):
        raise ValueError(
            f"gated_lstm: x {tuple(x.shape)}, h_0 {tuple(h_0.shape)}, h {tuple(h.shape)} differ in examples"
        )


def _fake(
    x: Tensor, h_0: Tensor, c_0: Tensor, from_input: GatedParameters, from_hidden: GatedParameters, *rest: Any
) -> tuple[Tensor, ...]:
    *_, save, save_response = rest
    (steps, batch), hidden = x.shape[:2], h_0.shape[1]

    def kept(width: int, wants: bool) -> Tensor:
        return x.new_empty(steps if wants else 0, batch, width)

    # Of no time step, every response is as wide as gates are.
    widths = [_response_width(side) if save and save_response else 4 * hidden for side in (from_input, from_hidden)]
    saved = kept(4 * hidden, save), kept(hidden, save), *(kept(width, save and save_response) for width in widths)
    return kept(hidden, True), torch.empty_like(c_0), *saved


def _backward(
    d_y: Tensor | None,
    d_c_n: Tensor | None,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    h: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    input_response: Tensor,
    hidden_response: Tensor,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor | None]:
    return over_time.backward(
        implementations.serving(x, h_0, h),
        torch.zeros_like(y) if d_y is None else d_y.contiguous(),
        None if d_c_n is None else d_c_n.contiguous(),
        x, h_0, c_0, from_input, from_hidden, h, y, Saved(gates, cells, input_response, hidden_response),
        reverse=reverse, wanted=wanted,
    )  # fmt: skip


_operation = Operation(
    "gated_lstm",
    _forward,
    outputs=("y", "c_n", *Saved._fields),
    fake=_fake,
    backward=_backward,
    differentiable=("x", "h_0", "c_0", "from_input", "from_hidden", "h"),
    check=_check_sizes,
    library=True,
)


def gated_lstm(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    hyper: HyperBatch | Tensor,
    *,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """One layer of an LSTM, in one direction, whose weights respond to each example's hyperparameters.

    i, f, g, o = linear(x_t; h) + linear(h_{t−1}; h), with
        linear(x; h) = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r, each with weights of its own, then
    c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g) and h_t = σ(o) ⊙ tanh(c_t), as in torch.nn.LSTM.

    Args:
        x: (T, B, I), at least one time step.
        h_0, c_0: the state before the first step, (B, H).
        from_input, from_hidden: `GatedParameters` of 4H outputs, of I and of H inputs; either may be of low rank.
        hyper: a HyperBatch, or its response input h, (B, n) with one row an example, or (n,) shared by all of them:
            then the layer is folded into a plain LSTM and costs half the products.
        reverse: whether time runs from the last step to the first; y stays in the order of x.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Gradients are computed only for inputs that require
    one. Forward-mode AD and torch.compile are supported; second derivatives in reverse mode are not, and raise where
    h has rows.

    Returns:
        y (T, B, H) and the state after the last step, (h_n, c_n), each (B, H); h_n may be a view of y.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    absent = [t is None for side in (from_input, from_hidden) for t in (side.bias, side.response_bias, side.bias_gate)]
    if any(absent) and not all(absent):
        raise ValueError(
            "gated_lstm: give bias, response_bias and bias_gate of both from_input and from_hidden, or none of them"
        )
    check_parameters("gated_lstm", from_input, "from_input.")
    check_parameters("gated_lstm", from_hidden, "from_hidden.")
    h = response_input(hyper, from_input.weight)
    direction = tangents.direction_of(hyper, from_input.weight, *from_input, *from_hidden)
    h = h if direction is None else direction
    check_examples("gated_lstm", x, hyper, example_dim=1)
    if dtype := autocast_dtype(x):
        x, h_0, c_0, h = (tensor.to(dtype) for tensor in (x, h_0, c_0, h))
        from_input, from_hidden = from_input.to(dtype), from_hidden.to(dtype)
    _check(x, h_0, c_0, from_input, from_hidden, h)
    if direction is not None:
        y, c_n = dual_lstm(x, h_0, c_0, from_input, from_hidden, h, reverse)
        return y, (y[0 if reverse else -1], c_n)
    if in_transform():
        rows = h.expand(x.shape[1], -1) if h.ndim == 1 else h
        return reference(x, h_0, c_0, from_input, from_hidden, rows, reverse)
    is_plain = tangents.is_centred(hyper)
    if h.ndim == 1 and (misled(x) or (rows_are_cheaper(h, from_input, from_hidden) and not is_plain)):
        h = h.expand(x.shape[1], -1)
    if h.ndim == 1:
        implementations.check(x, h_0, h)
        if is_plain:
            return _folded(x, h_0, c_0, from_input[:2], from_hidden[:2], reverse)
        return _folded(x, h_0, c_0, fold(from_input, h), fold(from_hidden, h), reverse)
    tensors = (x, h_0, c_0, *from_input, *from_hidden, h)
    needed = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    save_response = response_is_read(h, from_input, from_hidden)
    y, c_n, *_ = _operation(*contiguous(*tensors), reverse, needed, save_response)
    return y, (y[0 if reverse else -1], c_n)


def _folded(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: tuple[Tensor, Tensor | None],
    from_hidden: tuple[Tensor, Tensor | None],
    reverse: bool,
) -> tuple[Tensor, State]:
    """torch's own LSTM with these weights and biases.

    In its training mode where a gradient may be asked for: cuDNN keeps what backward needs in no other, whatever the
    mode of the layer is. Without dropout the results are the same.
    """
    biases = [bias for bias in (from_input[1], from_hidden[1]) if bias is not None]
    weights = [from_input[0], from_hidden[0], *biases]
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h_0, c_0, *weights))
    y, h_n, c_n = torch._VF.lstm(
        x.flip(0) if reverse else x,
        (h_0[None].contiguous(), c_0[None].contiguous()),
        weights,
        has_biases=bool(biases),
        num_layers=1,
        dropout=0.0,
        train=needed,
        bidirectional=False,
        batch_first=False,
    )
    watch(y, h_n, c_n)
    return y.flip(0) if reverse else y, (h_n[0], c_n[0])


def _check(
    x: Tensor, h_0: Tensor, c_0: Tensor, from_input: GatedParameters, from_hidden: GatedParameters, h: Tensor
) -> None:
    if not x.is_floating_point():
        raise ValueError(f"gated_lstm takes x of floating point numbers; got {x.dtype}")
    if x.ndim != 3 or x.shape[0] < 1 or h_0.ndim != 2 or h.ndim not in (1, 2):
        raise ValueError(
            "gated_lstm takes x (T, B, I) of at least one time step, h_0 (B, H) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, h_0 {tuple(h_0.shape)}, h {tuple(h.shape)}"
        )
    (_, batch, inputs), hidden, n = x.shape, h_0.shape[1], h.shape[-1]
    wide = 4 * hidden
    operands = (
        ("x", x, x.shape),
        ("h_0", h_0, (batch, hidden)),
        ("c_0", c_0, (batch, hidden)),
        ("h", h, (batch, n) if h.ndim == 2 else (n,)),
        *expected(from_input, (wide, inputs), wide, n, "from_input."),
        *expected(from_hidden, (wide, hidden), wide, n, "from_hidden."),
    )
    check_operands("gated_lstm", operands, from_input.weight, "from_input.weight", x=x, h_0=h_0, h=h)
