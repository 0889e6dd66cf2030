"""Baselines of gated LSTMs: cell by cell in plain torch, products for many time steps at once, and bare products.

All are independent of the code of stn_fast. An LSTM's operands are x (T, B, I), h_0 and c_0 (B, H), then W, b, R, r,
Gw, Gb of the input-to-hidden layer, the same of the hidden-to-hidden layer, and h (B, n); its result is y (T, B, H).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import Limit, gated_epilogue, gated_linear

State = tuple[Tensor, Tensor]


def lstm_cell(gates: Tensor, cell: Tensor) -> State:
    """(h_t, c_t) from the pre-activations of i, f, g, o (B, 4·H), and c_{t−1}."""
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def gated_step(x_t: Tensor, hidden: Tensor, cell: Tensor, *weights_and_h: Tensor) -> State:
    """(h_t, c_t): a gated linear layer of x_t, one of h_{t−1}, and the cell."""
    from_input, from_hidden, h = weights_and_h[:6], weights_and_h[6:12], weights_and_h[12]
    gates = gated_linear(x_t, *from_input, h) + gated_linear(hidden, *from_hidden, h)  # type: ignore[call-arg]
    return lstm_cell(gates, cell)


def gated_lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, *weights_and_h: Tensor, step: Callable[..., State] = gated_step
) -> Tensor:
    """A Python loop over the time steps."""
    states = []
    for x_t in x.unbind(0):
        hidden, cell = step(x_t, hidden, cell, *weights_and_h)
        states.append(hidden)
    return torch.stack(states)


def gated_cell(gates: Tensor, products: Tensor, scale: Tensor, shift: Tensor, cell: Tensor) -> State:
    """(h_t, c_t) from x's part of the gates and [P, Q] = h_{t−1} [W; R]ᵀ (B, 8·H): a time step without its product."""
    plain, response = products.chunk(2, dim=-1)
    return lstm_cell(gates + plain + scale * response + shift, cell)


def concatenated_lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    *weights_and_h: Tensor,
    epilogue: Callable[..., Tensor] = gated_epilogue,
    step: Callable[..., State] = gated_cell,
) -> Tensor:
    """One product with [W; R] for x over all time steps, and one per time step; constant parts are computed once."""
    w, b, r, rb, w_gate, b_gate = weights_and_h[:6]
    recurrent, recurrent_bias, response, response_bias, *gates, h = weights_and_h[6:]
    of_input = epilogue(F.linear(x, torch.cat([w, r])), b, rb, w_gate, b_gate, h)
    both, scale = torch.cat([recurrent, response]), F.linear(h, gates[0])
    shift = recurrent_bias + F.linear(h, gates[1]) * response_bias
    states = []
    for of_step in of_input.unbind(0):
        hidden, cell = step(of_step, F.linear(hidden, both), scale, shift, cell)
        states.append(hidden)
    return torch.stack(states)


def plain_lstm(x: Tensor, hidden: Tensor, cell: Tensor, *weights_and_h: Tensor) -> Tensor:
    """torch's own LSTM with W and b of both sides: half the products of the gated one, for orientation.

    In its training mode, the only one that cuDNN has a backward pass for.
    """
    weights = [weights_and_h[k] for k in (0, 6, 1, 7)]
    y: Tensor = torch.lstm(x, [hidden[None], cell[None]], weights, True, 1, 0.0, True, False, False)[0]
    return y


class SequenceLimit:
    """The bare library products of a gated LSTM, with all that they read laid out beforehand.

    x of all steps at once, as `Limit` has it, and single products for the gradients of the recurrent weights. The
    products with these weights come step by step, since a step's operand is the result of the one before; they are laid
    out as is fastest for few rows, and each result overwrites the last one.

    Args:
        inputs: of the input-to-hidden products, (T·B, I) rows.
        recurrent: of the hidden-to-hidden products; its x are the states (T·B, H) before each step.
        steps: T.
    """

    def __init__(self, inputs: Limit, recurrent: Limit, steps: int):
        self.inputs, self.recurrent = inputs, recurrent
        self.joined = recurrent.both_weights.T.contiguous()
        self.states = recurrent.x.chunk(steps)
        self.dy, self.gated_dy = recurrent.dy.chunk(steps), recurrent.gated_dy.chunk(steps)
        self.both_dy = recurrent.both_dy.chunk(steps)
        self.both, self.plain, self.response = (torch.empty_like(of[0]) for of in (self.both_dy, self.dy, self.dy))
        self.hidden = torch.empty_like(self.states[0])

    def forward_one(self) -> tuple[Tensor, ...]:
        for state in self.states:
            torch.mm(state, self.joined, out=self.both)
        return (*self.inputs.forward_one(), self.both)

    def forward_two(self) -> tuple[Tensor, ...]:
        for state in self.states:
            torch.mm(state, self.recurrent.weight.T, out=self.plain)
            torch.mm(state, self.recurrent.response_weight.T, out=self.response)
        return (*self.inputs.forward_two(), self.plain, self.response)

    def backward_one(self, weights: bool, first_state: bool) -> tuple[Tensor, ...]:
        """dx and the states' gradients, that of the first where asked; with ``weights`` also those of all matrices."""
        for both_dy in self.both_dy[0 if first_state else 1 :]:
            torch.mm(both_dy, self.joined.T, out=self.hidden)
        gradients = (*self.inputs.backward_one(weights), self.hidden)
        return (*gradients, self.recurrent.both_dy.T @ self.recurrent.x) if weights else gradients

    def backward_two(self, weights: bool, first_state: bool) -> tuple[Tensor, ...]:
        """The same with two products for every one."""
        limit = self.recurrent
        for k in range(0 if first_state else 1, len(self.dy)):
            torch.mm(self.dy[k], limit.weight, out=self.hidden)
            torch.addmm(self.hidden, self.gated_dy[k], limit.response_weight, out=self.hidden)
        gradients = (*self.inputs.backward_two(weights), self.hidden)
        return (*gradients, limit.dy.T @ limit.x, limit.gated_dy.T @ limit.x) if weights else gradients
