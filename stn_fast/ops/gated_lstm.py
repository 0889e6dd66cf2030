"""gated_lstm: one layer of an LSTM, in one direction, whose weights respond to each example's hyperparameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from stn_fast.ops import _gated_lstm_driver as driver
from stn_fast.ops import gated_linear
from stn_fast.ops._casts import cast
from stn_fast.ops._eager import eager_function, register, traced
from stn_fast.ops._gated_lstm_driver import Saved, Weights
from stn_fast.ops._gated_lstm_plain import Plain
from stn_fast.ops._operands import check_operands
from stn_fast.ops._transforms import in_transform
from stn_fast.ops.memory import autocast_dtype, reads_memory
from stn_fast.ops.openmp import any_team, misled, watch
from stn_fast.ops.serving import serving

__all__ = ["Weights", "fold", "gated_lstm", "reference"]

State = tuple[Tensor, Tensor]


def reference(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: Weights,
    from_hidden: Weights,
    h: Tensor,
    reverse: bool = False,
) -> tuple[Tensor, State]:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    states, (hidden, cell) = [], (h_0, c_0)
    for x_t in x.unbind(0)[:: -1 if reverse else 1]:
        before = gated_linear.reference(x_t, *from_input, h) + gated_linear.reference(hidden, *from_hidden, h)
        i, f, g, o = before.chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        states.append(hidden)
    return torch.stack(states[:: -1 if reverse else 1]), (hidden, cell)


def fold(weights: Weights, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the plain LSTM's side that `weights` are at a single h (n,)."""
    return gated_linear.fold(*weights, h)


def _kernels(backend: str, save_response: bool = False) -> driver.Kernels:
    if backend == "cpp":
        from stn_fast.ops._gated_lstm_cpu import Core

        return Core()
    if backend == "triton":
        from stn_fast.ops._gated_lstm_triton import Triton

        return Triton(save_response)
    return Plain()


@reads_memory
@any_team
def _compute(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    response_weight_ih: Tensor,
    response_bias_ih: Tensor | None,
    weight_gate_ih: Tensor,
    bias_gate_ih: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    response_weight_hh: Tensor,
    response_bias_hh: Tensor | None,
    weight_gate_hh: Tensor,
    bias_gate_hh: Tensor | None,
    h: Tensor,
    reverse: bool,
    save: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, c_n, *Saved), what is saved having no time step where nobody will ask."""
    from_input = Weights(weight_ih, bias_ih, response_weight_ih, response_bias_ih, weight_gate_ih, bias_gate_ih)
    from_hidden = Weights(weight_hh, bias_hh, response_weight_hh, response_bias_hh, weight_gate_hh, bias_gate_hh)
    y, c_n, saved = driver.forward(
        _kernels(serving(x, h, h_0), save_response), x, h_0, c_0, from_input, from_hidden, h,
        reverse=reverse, save=save, save_response=save_response,
    )  # fmt: skip
    if saved is None:
        batch, hidden = h_0.shape
        saved = Saved(*(x.new_empty(0, batch, width) for width in (4 * hidden, hidden, 4 * hidden, 4 * hidden)))
    return y, c_n, *saved


def _check_sizes(x: Tensor, h_0: Tensor, c_0: Tensor, *rest: Any) -> None:
    h = rest[12]
    if not x.shape[1] == len(h_0) == len(c_0) == len(h):
        raise ValueError(
            f"gated_lstm: x {tuple(x.shape)}, h_0 {tuple(h_0.shape)}, h {tuple(h.shape)} differ in examples"
        )


_gated_lstm = register("gated_lstm", _compute, _check_sizes)


@_gated_lstm.register_fake
def _(x, h_0, c_0, *rest):
    *_, _, save, save_response = rest
    (steps, batch), hidden = x.shape[:2], h_0.shape[1]

    def kept(width, wants):
        return x.new_empty(steps if wants else 0, batch, width)

    saved = kept(4 * hidden, save), kept(hidden, save), *(kept(4 * hidden, save and save_response) for _ in range(2))
    return kept(hidden, True), torch.empty_like(c_0), *saved


@reads_memory
@any_team
def _compute_backward(
    dy: Tensor,
    d_last_cell: Tensor | None,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    response_weight_ih: Tensor,
    response_bias_ih: Tensor | None,
    weight_gate_ih: Tensor,
    bias_gate_ih: Tensor | None,
    weight_hh: Tensor,
    response_weight_hh: Tensor,
    response_bias_hh: Tensor | None,
    weight_gate_hh: Tensor,
    bias_gate_hh: Tensor | None,
    h: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    input_response: Tensor,
    hidden_response: Tensor,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients, in the order of the operands of `gated_lstm`."""
    from_input = Weights(weight_ih, None, response_weight_ih, response_bias_ih, weight_gate_ih, bias_gate_ih)
    from_hidden = Weights(weight_hh, None, response_weight_hh, response_bias_hh, weight_gate_hh, bias_gate_hh)
    saved = Saved(gates, cells, input_response, hidden_response)
    incoming = dy.contiguous(), None if d_last_cell is None else d_last_cell.contiguous()
    gradients = driver.backward(
        _kernels(serving(x, h, h_0)), *incoming, x, h_0, c_0, from_input, from_hidden, h, y, saved,
        reverse=reverse, wanted=wanted,
    )  # fmt: skip
    return [gradient for gradient in gradients if gradient is not None]


_gated_lstm_backward = torch.library.custom_op("stn_fast::gated_lstm_backward", _compute_backward, mutates_args=())


@_gated_lstm_backward.register_fake
def _(dy, d_last_cell, x, h_0, c_0, *rest):
    weights, h, wanted = rest[:10], rest[10], rest[-1]
    sides = [(side[0], side[0].new_empty(side[0].shape[0]), *side[1:]) for side in (weights[:5], weights[5:])]
    likes = (x, h_0, c_0, *sides[0], *sides[1], h)
    return [torch.empty_like(like) for like, wants in zip(likes, wanted, strict=True) if wants]


_OPERANDS = 16


def _setup_context(ctx, inputs, output):
    x, h_0, c_0, *weights, h, ctx.reverse, _, _ = inputs
    y, _, *saved = output
    biases = (1, 7)
    kept = [weight for position, weight in enumerate(weights) if position not in biases]
    ctx.save_for_backward(x, h_0, c_0, *kept, h, y, *saved)
    ctx.set_materialize_grads(False)


def _backward(compute, ctx, dy, d_last_cell, *_):
    wanted = list(ctx.needs_input_grad[:_OPERANDS])
    if not any(wanted) or (dy is None and d_last_cell is None):
        return (None,) * (_OPERANDS + 3)
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[-5])
    gradients = iter(compute(dy, d_last_cell, *saved, ctx.reverse, wanted))
    return (*(next(gradients) if wants else None for wants in wanted), None, None, None)


_gated_lstm.register_autograd(partial(_backward, _gated_lstm_backward), setup_context=_setup_context)
_eager = eager_function(_compute, _setup_context, _backward, _compute_backward, _gated_lstm_backward)


def gated_lstm(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: Weights,
    from_hidden: Weights,
    h: Tensor,
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
        from_input, from_hidden: `Weights` of 4H outputs, of I and of H inputs.
        h: response input, (B, n) with one row an example, or (n,) shared by all of them: then the layer is
            folded into a plain LSTM and costs half the products.
        reverse: whether time runs from the last step to the first; y stays in the order of x.

    All tensors are on one device and of one dtype: float32, float64, bfloat16 or float16. Under autocast each is cast
    to autocast's, but float64 is left alone, as in torch. Gradients are computed for those inputs alone that require
    one. Forward-mode AD and torch.compile are supported; second derivatives in reverse mode are not, and raise where
    h has rows.

    Returns:
        y (T, B, H) and the state after the last step, (h_n, c_n), each (B, H); h_n may be a view of y.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    if dtype := autocast_dtype(x):
        x, h_0, c_0, h = (tensor.to(dtype) for tensor in (x, h_0, c_0, h))
        from_input, from_hidden = (
            Weights._make(cast(tensor, dtype) for tensor in weights) for weights in (from_input, from_hidden)
        )
    _check(x, h_0, c_0, from_input, from_hidden, h)
    if in_transform():
        rows = h.expand(x.shape[1], -1) if h.ndim == 1 else h
        return reference(x, h_0, c_0, from_input, from_hidden, rows, reverse)
    if h.ndim == 1 and misled(x):
        h = h.expand(x.shape[1], -1)
    if h.ndim == 1:
        serving(x, h, h_0)  # raises where a backend was asked for that can't serve
        return _folded(x, h_0, c_0, fold(from_input, h), fold(from_hidden, h), reverse)
    tensors = (x, h_0, c_0, *from_input, *from_hidden, h)
    needed = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    gates = (h, from_input.weight_gate, from_hidden.weight_gate)
    save_response = needed and any(tensor.requires_grad for tensor in gates)
    run = _gated_lstm if traced(*tensors) else _eager
    operands = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    y, c_n, *_ = run(*operands, reverse, needed, save_response)
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


def _check(x: Tensor, h_0: Tensor, c_0: Tensor, from_input: Weights, from_hidden: Weights, h: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"gated_lstm wants x of floating point numbers; got {x.dtype}")
    if x.ndim != 3 or x.shape[0] < 1 or h_0.ndim != 2 or h.ndim not in (1, 2):
        raise ValueError(
            "gated_lstm wants x (T, B, I) of at least one time step, h_0 (B, H) and h (B, n) or (n,); "
            f"got x {tuple(x.shape)}, h_0 {tuple(h_0.shape)}, h {tuple(h.shape)}"
        )
    (_, batch, inputs), hidden, n = x.shape, h_0.shape[1], h.shape[-1]
    wanted: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "x": (x, tuple(x.shape)),
        "h_0": (h_0, (batch, hidden)),
        "c_0": (c_0, (batch, hidden)),
        "h": (h, (batch, n) if h.ndim == 2 else (n,)),
    }
    absent = [t is None for side in (from_input, from_hidden) for t in (side.bias, side.response_bias, side.bias_gate)]
    if any(absent) and not all(absent):
        raise ValueError(
            "gated_lstm: give bias, response_bias and bias_gate of both from_input and from_hidden, or none of them"
        )
    for side, weights, columns in (("from_input", from_input, inputs), ("from_hidden", from_hidden, hidden)):
        matrix, vector, gate = (4 * hidden, columns), (4 * hidden,), (4 * hidden, n)
        shapes = (matrix, vector, matrix, vector, gate, gate)
        for name, tensor, shape in zip(Weights._fields, weights, shapes, strict=True):
            if tensor is not None:
                wanted[f"{side}.{name}"] = tensor, shape
    check_operands("gated_lstm", wanted, from_input.weight, "from_input.weight", x=x, h_0=h_0, h=h)
