"""gated_lstm over a whole sequence: products of all time steps at once where time allows, else one step at a time.

What surrounds a step's products is one pass, `cell_forward` or `cell_backward`: plain torch here, fused kernels
elsewhere. The input's share of all steps, and every gradient of weights, gates and hyperparameters, are those of a
gated linear layer whose rows are (T, B) positions of B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from stn_fast.ops._gated_linear_plain import Gradients, Wanted, backward_plain, forward_plain


class Weights(NamedTuple):
    """W, b, R, r, Gw, Gb of a gated linear layer with O outputs; b, r and Gb may be None together.

    Shapes: weight, response_weight (O, I); bias, response_bias (O,); weight_gate, bias_gate (O, n).
    """

    weight: Tensor
    bias: Tensor | None
    response_weight: Tensor
    response_bias: Tensor | None
    weight_gate: Tensor
    bias_gate: Tensor | None


class Saved(NamedTuple):
    """What backward needs of forward: activated gates i, f, g, o (T, B, 4H), cell states (T, B, H), and both responses
    x Rᵀ (T, B, 4H), of no time step where nobody wants the gradient of a gate or of the hyperparameters."""

    gates: Tensor
    cells: Tensor
    input_response: Tensor
    hidden_response: Tensor


class Kernels(Protocol):
    """A gated linear layer and the pass around a time step's products."""

    @property
    def linear_forward(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """As `forward_plain`: y and x Rᵀ."""

    @property
    def linear_backward(self) -> Callable[..., Gradients]:
        """As `backward_plain`."""

    def cell_forward(
        self,
        gates: Tensor,
        p: Tensor,
        q: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        c_before: Tensor,
        c: Tensor,
        h: Tensor,
    ) -> None:
        """Writes gates ← activated (gates + p + scale ⊙ q + shift), c ← f ⊙ c_before + i ⊙ g and h ← o ⊙ tanh c."""

    def cell_backward(
        self,
        dy: Tensor,
        dh: Tensor | None,
        dc: Tensor,
        gates: Tensor,
        c: Tensor,
        c_before: Tensor,
        scale: Tensor,
        d_gates: Tensor,
        d_q: Tensor,
    ) -> None:
        """From dy + dh and dc: d_gates, before the activations, d_q ← d_gates ⊙ scale and dc ← that of c_before."""


class Plain:
    """In plain torch, for any dtype and device; a step of 16-bit numbers is computed in float32 and rounded once."""

    linear_forward = staticmethod(forward_plain)
    linear_backward = staticmethod(backward_plain)

    @staticmethod
    def cell_forward(
        gates: Tensor,
        p: Tensor,
        q: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        c_before: Tensor,
        c: Tensor,
        h: Tensor,
    ) -> None:
        wide = torch.promote_types(gates.dtype, torch.float32)
        before = torch.addcmul(gates.to(wide) + p, scale.to(wide), q.to(wide))
        i, f, g, o = (before if shift is None else before + shift).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * c_before + i * g
        gates.copy_(torch.cat([i, f, g, o], dim=-1))
        c.copy_(cell)
        h.copy_(o * cell.tanh())

    @staticmethod
    def cell_backward(
        dy: Tensor,
        dh: Tensor | None,
        dc: Tensor,
        gates: Tensor,
        c: Tensor,
        c_before: Tensor,
        scale: Tensor,
        d_gates: Tensor,
        d_q: Tensor,
    ) -> None:
        i, f, g, o = gates.to(dc.dtype).chunk(4, -1)
        d_h = dy.to(dc.dtype) if dh is None else dy.to(dc.dtype) + dh
        tanh_c = c.to(dc.dtype).tanh()
        d_c = dc + d_h * o * (1 - tanh_c * tanh_c)
        d_i, d_f = d_c * g * i * (1 - i), d_c * c_before * f * (1 - f)
        d_g, d_o = d_c * i * (1 - g * g), d_h * tanh_c * o * (1 - o)
        before = torch.cat([d_i, d_f, d_g, d_o], dim=-1)
        d_gates.copy_(before)
        d_q.copy_(before * scale)
        dc.copy_(d_c * f)


def forward(
    kernels: Kernels,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: Weights,
    from_hidden: Weights,
    h: Tensor,
    *,
    reverse: bool,
    save: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor, Saved | None]:
    """(y (T, B, H), last cell state, what backward needs); the responses x Rᵀ are kept where `save_response`."""
    steps, batch = x.shape[:2]
    wide = from_hidden.weight.shape[0]
    both, input_response = kernels.linear_forward(x.flatten(0, 1), *from_input, h, steps, 1)
    gates = both.view(steps, batch, wide)
    scale = h @ from_hidden.weight_gate.T
    shift = None
    if from_hidden.bias is not None and from_hidden.response_bias is not None and from_hidden.bias_gate is not None:
        shift = torch.addcmul(from_hidden.bias, h @ from_hidden.bias_gate.T, from_hidden.response_bias)
    weight, response_weight = from_hidden.weight.T, from_hidden.response_weight.T
    y, p = x.new_empty(steps, batch, h_0.shape[1]), x.new_empty(batch, wide)
    cells = torch.empty_like(y) if save else x.new_empty(1, *c_0.shape)
    hidden_response = x.new_empty(steps if save_response else 1, batch, wide)
    h_before, c_before = h_0, c_0
    for t in _order(steps, reverse):
        q, c = hidden_response[t if save_response else 0], cells[t if save else 0]
        torch.mm(h_before, weight, out=p)
        torch.mm(h_before, response_weight, out=q)
        kernels.cell_forward(gates[t], p, q, scale, shift, c_before, c, h_before := y[t])
        c_before = c
    if not save:
        return y, c_before.clone(), None
    nothing = x.new_empty(0, batch, wide)
    responses = (input_response.view_as(gates), hidden_response) if save_response else (nothing, nothing.clone())
    return y, c_before.clone(), Saved(gates, cells, *responses)


def backward(
    kernels: Kernels,
    dy: Tensor,
    d_last_cell: Tensor | None,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: Weights,
    from_hidden: Weights,
    h: Tensor,
    y: Tensor,
    saved: Saved,
    *,
    reverse: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, h_0, c_0, all of `from_input`, all of `from_hidden` and h; None where not wanted."""
    wants_x, wants_h_0, wants_c_0, *wants_weights, wants_h = wanted
    steps = len(x)
    cells = saved.cells
    scale = h @ from_hidden.weight_gate.T
    d_gates = torch.empty_like(saved.gates)
    d_q = torch.empty_like(d_gates[0])
    # The gradient of the cell state is handed from step to step: in float32 at least, as a sum of many terms.
    dc = torch.zeros_like(c_0, dtype=torch.promote_types(c_0.dtype, torch.float32))
    if d_last_cell is not None:
        dc.copy_(d_last_cell)
    dh, product = None, torch.empty_like(h_0)
    order = _order(steps, reverse)
    for position in range(steps - 1, -1, -1):
        t, first = order[position], position == 0
        c_before = c_0 if first else cells[order[position - 1]]
        kernels.cell_backward(dy[t], dh, dc, saved.gates[t], cells[t], c_before, scale, d_gates[t], d_q)
        if not first or wants_h_0:
            dh = torch.mm(d_gates[t], from_hidden.weight, out=product).addmm_(d_q, from_hidden.response_weight)

    def linear(weights: Weights, positions: Tensor, response: Tensor, wants: Sequence[bool]) -> Gradients:
        rows = (d_gates.flatten(0, 1), positions.flatten(0, 1), weights.weight, *weights[2:], h)
        return kernels.linear_backward(*rows, response.flatten(0, 1), steps, 1, Wanted._make([*wants, wants_h]))

    input_side = linear(from_input, x, saved.input_response, [wants_x, *wants_weights[:6]])
    before = torch.cat([y[1:], h_0[None]] if reverse else [h_0[None], y[:-1]]) if any(wants_weights[6:]) else y
    hidden_side = linear(from_hidden, before, saved.hidden_response, [False, *wants_weights[6:]])
    d_h = None if input_side.h is None or hidden_side.h is None else input_side.h + hidden_side.h
    return [
        None if input_side.x is None else input_side.x.view_as(x),
        dh if wants_h_0 else None,
        dc.to(c_0.dtype) if wants_c_0 else None,
        *input_side[1:7],
        *hidden_side[1:7],
        d_h,
    ]


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)
