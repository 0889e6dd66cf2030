"""gated_lstm around its recurrence: all products of all time steps at once where time allows.

The input's share of every step, and every gradient of weights, gates and hyperparameters, are those of a gated linear
layer whose rows are (T, B) positions of B examples. What is left to do step by step is the recurrence: plain torch in
`plain`, fused kernels elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters, Gradients, Wanted


class Saved(NamedTuple):
    """What backward needs of forward: activated gates i, f, g, o (T, B, 4H), cell states (T, B, H), and both responses
    x Rᵀ (T, B, 4H), of no time step where nobody wants the gradient of a gate or of the hyperparameters; of responses
    of low rank u = x Bᵀ (T, B, k), which the gradient of A reads too."""

    gates: Tensor
    cells: Tensor
    input_response: Tensor
    hidden_response: Tensor


class Recurrence(NamedTuple):
    """y (T, B, H), c_n (B, H), and where kept the cell states (T, B, H) and the responses h_{t−1} Rᵀ (T, B, 4H), or of
    low rank h_{t−1} Bᵀ (T, B, k)."""

    y: Tensor
    c_n: Tensor
    cells: Tensor | None
    response: Tensor | None


class RecurrenceGradients(NamedTuple):
    """d_gates (T, B, 4H), before the activations; dh_0 (B, H) where wanted; dc_0 (B, H), in float32 at least."""

    d_gates: Tensor
    d_h_0: Tensor | None
    d_c_0: Tensor


class Backend(Protocol):
    """A module of this folder: the recurrence, and the gated linear layer that goes with it. Tensors are contiguous."""

    def linear(self, h: Tensor) -> ModuleType:
        """The module of gated_linear that computes the layer's products over all steps."""

    def forward(
        self,
        gates: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weight: Tensor,
        response_weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        reverse: bool,
        save: bool,
        save_response: bool,
        projection: Tensor | None,
    ) -> Recurrence:
        """gates (T, B, 4H) hold the input's share on entry and, where `save`, activated i, f, g, o on return.

        They are of gates[t] + h_{t−1} Wᵀ + scale ⊙ h_{t−1} Rᵀ + shift with W, R (4H, H) and scale, shift (B, 4H).
        Cells and responses are kept where `save` and `save_response`. With a projection B (k, H), R is A B and
        response_weight is A (4H, k).
        """

    def backward(
        self,
        dy: Tensor,
        d_last_cell: Tensor | None,
        gates: Tensor,
        cells: Tensor,
        c_0: Tensor,
        weight: Tensor,
        response_weight: Tensor,
        scale: Tensor,
        reverse: bool,
        wants_h_0: bool,
        projection: Tensor | None,
    ) -> RecurrenceGradients:
        """From the gradients of y and c_n and what `forward` kept."""


def in_time(steps: int, reverse: bool) -> range:
    """The time steps in the order in which forward takes them."""
    return range(steps - 1, -1, -1) if reverse else range(steps)


def forward(
    backend: Backend,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    h: Tensor,
    *,
    reverse: bool,
    save: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """(y (T, B, H), last cell state, what backward needs); the responses x Rᵀ are kept where `save_response`."""
    (steps, batch), wide = x.shape[:2], from_hidden.weight.shape[0]
    both, input_response = backend.linear(h).forward(x.flatten(0, 1), from_input, h, steps, 1, save_response)
    gates = both.view(steps, batch, wide)
    shift = None
    if from_hidden.bias is not None and from_hidden.response_bias is not None and from_hidden.bias_gate is not None:
        shift = torch.addcmul(from_hidden.bias, h @ from_hidden.bias_gate.T, from_hidden.response_bias)
    y, c_n, cells, hidden_response = backend.forward(
        gates, h_0, c_0, from_hidden.weight, from_hidden.response_weight, h @ from_hidden.weight_gate.T, shift,
        reverse, save, save_response, from_hidden.response_projection,
    )  # fmt: skip
    if cells is None:
        return y, c_n, None
    if input_response is None or hidden_response is None:
        return y, c_n, Saved(gates, cells, *(x.new_empty(0, batch, wide) for _ in range(2)))
    return y, c_n, Saved(gates, cells, input_response.unflatten(0, (steps, batch)), hidden_response)


def backward(
    backend: Backend,
    dy: Tensor,
    d_last_cell: Tensor | None,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: GatedParameters,
    from_hidden: GatedParameters,
    h: Tensor,
    y: Tensor,
    saved: Saved,
    *,
    reverse: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0, all of `from_input`, all of `from_hidden` and h; None where not wanted."""
    wants_x, wants_h_0, wants_c_0, *wants_weights, wants_h = wanted
    d_gates, d_h_0, d_c_0 = backend.backward(
        dy, d_last_cell, saved.gates, saved.cells, c_0, from_hidden.weight, from_hidden.response_weight,
        h @ from_hidden.weight_gate.T, reverse, wants_h_0, from_hidden.response_projection,
    )  # fmt: skip

    def linear(weights: GatedParameters, positions: Tensor, response: Tensor, wants: Sequence[bool]) -> Gradients:
        rows = (d_gates.flatten(0, 1), positions.flatten(0, 1), weights, h, response.flatten(0, 1))
        return backend.linear(h).backward(*rows, len(x), 1, Wanted._make([*wants, wants_h]))

    of_side = len(GatedParameters._fields)
    wants_input, wants_hidden = [wants_x, *wants_weights[:of_side]], [False, *wants_weights[of_side:]]
    input_side = linear(from_input, x, saved.input_response, wants_input)
    # Only the gradients of W and R, or of B, read the states before each step.
    before = y
    wants = Wanted._make([*wants_hidden, wants_h])
    if wants.weight or wants.response_weight or wants.response_projection:
        before = torch.cat([y[1:], h_0[None]] if reverse else [h_0[None], y[:-1]])
    hidden_side = linear(from_hidden, before, saved.hidden_response, wants_hidden)
    d_h = None if input_side.h is None or hidden_side.h is None else input_side.h + hidden_side.h
    return [
        None if input_side.x is None else input_side.x.view_as(x),
        d_h_0,
        d_c_0.to(c_0.dtype) if wants_c_0 else None,
        *input_side[1:-1],
        *hidden_side[1:-1],
        d_h,
    ]
