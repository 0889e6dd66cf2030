"""The tangent of an LSTM at h = 0, in one direction of time.

With the activated gates and cell states of the LSTM itself at hand, the tangent of its states is a linear recurrence:

    ċ_t = f ċ_{t−1} + c_{t−1} f (1 − f) ḟ_t + g i (1 − i) i̇_t + i (1 − g²) ġ_t
    ẏ_t = tanh(c_t) o (1 − o) ȯ_t + o (1 − tanh²(c_t)) ċ_t

where i̇_t, ḟ_t, ġ_t, ȯ_t are the tangents before the activations, ẏ_{t−1} W_hhᵀ and what all time steps share in one
product. The transpose of the recurrence is the backward pass of a plain LSTM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stn_fast.ops import tangents
from stn_fast.ops.gated_linear import of_sum, response
from stn_fast.ops.gated_sum import gated_sum
from stn_fast.ops.gates import GatedParameters
from stn_fast.ops.linear import linear
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations

implementations = Implementations("stn_fast.ops.gated_lstm")


def _forward_states(
    before: Tensor, h_0: Tensor, c_0: Tensor, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, c_n, gates, cells) of an LSTM, from the input's share of each step (T, B, 4H)."""
    module, gates = implementations.serving(before, h_0), before.clone()
    y, c_n, cells, _ = module.forward(gates, h_0, c_0, weight, None, None, None, reverse, True, False, None)
    return y, c_n, gates, cells


def _fake_states(
    before: Tensor, h_0: Tensor, c_0: Tensor, weight: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = h_0.new_empty(before.shape[0], *h_0.shape)
    return y, torch.empty_like(c_0), torch.empty_like(before), torch.empty_like(y)


def _no_gradients(d_y: Tensor | None, wanted: list[bool]) -> list[Tensor]:
    return []


_states = Operation(
    "lstm_states",
    _forward_states,
    outputs=("y", "c_n", "gates", "cells"),
    fake=_fake_states,
    backward=_no_gradients,
    library=True,
)


def _forward(
    d_before: Tensor,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    d_h_0: Tensor | None,
    d_c_0: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    module = implementations.serving(d_before, c_0)
    return module.tangent(d_before, weight, gates, cells, c_0, d_h_0, d_c_0, reverse)


def _fake(
    d_before: Tensor, weight: Tensor, gates: Tensor, cells: Tensor, c_0: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    return cells.new_empty(cells.shape), c_0.new_empty(c_0.shape)


def _backward(
    d_dy: Tensor | None,
    d_dc_n: Tensor | None,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    reverse: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor]:
    module = implementations.serving(gates, c_0)
    found = module.backward(
        torch.zeros_like(cells) if d_dy is None else d_dy.contiguous(),
        None if d_dc_n is None else d_dc_n.contiguous(),
        gates, cells, c_0, weight, None, None, reverse, wanted[1], None,
    )  # fmt: skip
    return found.d_gates, found.d_h_0, found.d_c_0.to(c_0.dtype)


def _like(
    d_dy: Tensor | None, d_dc_n: Tensor | None, weight: Tensor, gates: Tensor, cells: Tensor, c_0: Tensor, *_: object
) -> list[Tensor]:
    return [gates, c_0, c_0]


_operation = Operation(
    "lstm_tangent",
    _forward,
    outputs=("dy", "dc_n"),
    fake=_fake,
    backward=_backward,
    differentiable=("d_before", "d_h_0", "d_c_0"),
    fake_backward=_like,
    library=True,
)


def dual_lstm(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    direction: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(y, c_n) at h = 0, as dual tensors with their tangents along a change of h (B, n).

    The input and the state themselves, without their tangents, are taken for constants.

    Raises:
        RuntimeError: the weights require a gradient.
    """
    (x, dx), (h_0, dh_0), (c_0, dc_0) = map(tangents.split, (x, h_0, c_0))
    x, h_0, c_0 = (t.detach() for t in (x, h_0, c_0))
    weights = (*from_input[:2], *from_hidden[:2])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in weights):
        raise RuntimeError(
            "gated_lstm: at h = 0, outputs with tangents have no gradient with respect to W and b: set requires_grad "
            "to False for these, as the response step of Δ-STN does"
        )
    steps, batch, _ = x.shape
    with tangents.paused():
        bias = None if from_input.bias is None or from_hidden.bias is None else from_input.bias + from_hidden.bias
        before = linear(x, from_input.weight, bias).contiguous()
        y, c_n, gates, cells = _states(
            before, h_0.contiguous(), c_0.contiguous(), from_hidden.weight.contiguous(), reverse
        )
        earlier = torch.cat([y[1:], h_0[None]] if reverse else [h_0[None], y[:-1]])
        p = None if dx is None else linear(dx, from_input.weight).flatten(0, 1)
        for side, of_side in ((x, from_input), (earlier, from_hidden)):
            p = gated_sum(response(side, of_side).flatten(0, 1), *of_sum(of_side), direction, p, outer=steps)
        assert p is not None
        states = [None if t is None else t.contiguous() for t in (dh_0, dc_0)]
        operands = (from_hidden.weight.contiguous(), gates, cells, c_0.contiguous())
        dy, dc_n = _operation(p.view(steps, batch, len(from_hidden.weight)), *operands, *states, reverse)
    return tangents.dual(y, dy), tangents.dual(c_n, dc_n)
