"""The measured cases on sequences: a layer of a gated LSTM, and its providers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import sequences
from benchmarks.baselines import Limit
from benchmarks.gradients import compiled, differentiate
from benchmarks.recurrences import ways
from benchmarks.sequences import SequenceLimit
from benchmarks.timing import Provider

if TYPE_CHECKING:
    from benchmarks.cases import Case

HYPERPARAMETERS = 7

# (T, B, H), the input as wide as the hidden state: a layer of the PTB network, and of its small sister.
GATED_LSTM_SHAPES = ((70, 40, 650), (35, 20, 200))
# On CUDA also a layer of a larger language model, which would take a CPU seconds.
LARGE_GATED_LSTM_SHAPES = ((70, 80, 1150),)

_X_STATE, _WEIGHTS, _H = (True,) * 3, (True,) * 12, (True,)
_VALID = (True, False, False) + (False,) * 12 + (True,)
# mode: (whether the forward is timed, which of x, h_0, c_0, the twelve weights, h have their gradient timed)
GATED_LSTM_MODES: dict[str, tuple[bool, tuple[bool, ...]]] = {
    "train": (True, (*_X_STATE, *_WEIGHTS, False)),
    "full": (True, (*_X_STATE, *_WEIGHTS, *_H)),
    "valid": (True, _VALID),
    "full_backward": (False, (*_X_STATE, *_WEIGHTS, *_H)),
    "valid_backward": (False, _VALID),
}


def gated_lstm_shapes(device: torch.device) -> tuple[tuple[int, ...], ...]:
    return GATED_LSTM_SHAPES + (LARGE_GATED_LSTM_SHAPES if device.type == "cuda" else ())


def gated_lstm_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Operands of sizes that a trained layer has, and dy."""
    steps, batch, hidden = case.shape
    wide, bound = 4 * hidden, hidden**-0.5

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=case.device).mul_(scale).to(case.dtype)

    def side() -> list[Tensor]:
        matrices = [normal(wide, hidden, scale=bound) for _ in range(2)]
        biases = [normal(wide, scale=bound) for _ in range(2)]
        gates = [normal(wide, HYPERPARAMETERS, scale=0.1) for _ in range(2)]
        return [matrices[0], biases[0], matrices[1], biases[1], *gates]

    state = [normal(batch, hidden, scale=0.3) for _ in range(2)]
    inputs = [normal(steps, batch, hidden), *state, *side(), *side(), normal(batch, HYPERPARAMETERS)]
    return inputs, normal(steps, batch, hidden)


def gated_lstm(case: Case) -> dict[str, Provider]:
    """The package, loops in eager torch and with a compiled step, products joined where they can be, and the limit."""
    inputs, dy = gated_lstm_inputs(case)
    forward, wanted = GATED_LSTM_MODES[case.mode]

    def provider(function: Callable[..., Tensor], wanted: Sequence[bool] = wanted) -> Provider:
        return differentiate(function, inputs, wanted, dy, forward)

    providers = {"stn_fast": provider(_fused), "eager": provider(sequences.gated_lstm)}
    _, batch, hidden = case.shape
    providers |= ways(providers["stn_fast"], batch, hidden, case.dtype, case.device)
    if case.compiled:
        epilogue, cell = compiled(sequences.gated_epilogue), compiled(sequences.gated_cell)
        providers["compiled_step"] = provider(partial(sequences.gated_lstm, step=compiled(sequences.gated_step)))
        providers["concatenated"] = provider(partial(sequences.concatenated_lstm, epilogue=epilogue, step=cell))
    # Its own inputs alone: x, the state, and W and b of both sides.
    own = tuple(want and k in (0, 1, 2, 3, 4, 9, 10) for k, want in enumerate(wanted))
    providers["plain_lstm"] = differentiate(sequences.plain_lstm, _in_one_piece(inputs), own, dy, forward)
    if case.mode == "valid_backward":
        _, everything = GATED_LSTM_MODES["full_backward"]
        providers["stn_fast_full_backward"] = provider(_fused, everything)
    return providers | _limits(case, inputs, forward, wanted)


def _in_one_piece(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same operands, W and b of both sides where torch.nn.LSTM puts them: cuDNN would copy them in every call."""
    x, h_0, *_ = inputs
    plain = torch.nn.LSTM(x.shape[2], h_0.shape[1], device=x.device, dtype=x.dtype)
    laid_out = list(inputs)
    for parameter, k in zip(plain.parameters(), (3, 9, 4, 10), strict=True):
        laid_out[k] = parameter.detach().copy_(inputs[k])
    return laid_out


def _fused(x: Tensor, h_0: Tensor, c_0: Tensor, *weights_and_h: Tensor) -> Tensor:
    from stn_fast.functional import GatedParameters, gated_lstm

    *weights, h = weights_and_h
    return gated_lstm(x, h_0, c_0, GatedParameters(*weights[:6]), GatedParameters(*weights[6:]), h)[0]


def sequence_limit(inputs: Sequence[Tensor]) -> SequenceLimit:
    """The products of these operands, with gradients and states of any value."""
    x, h_0, _, *weights, h = inputs
    rows, steps = x.flatten(0, 1), len(x)
    states, d_gates = (rows.new_empty(len(rows), width).normal_() for width in (h_0.shape[1], len(weights[0])))
    limits = [
        Limit.of(of, side[0], side[2], d_gates, d_gates * (h @ side[4].T).repeat(steps, 1))
        for of, side in ((rows, weights[:6]), (states, weights[6:]))
    ]
    return SequenceLimit(limits[0], limits[1], steps)


def _limits(case: Case, inputs: Sequence[Tensor], forward: bool, wanted: Sequence[bool]) -> dict[str, Provider]:
    limit, asked = sequence_limit(inputs), dict(weights=wanted[3], first_state=wanted[1])

    def one(_: None) -> object:
        return (limit.forward_one() if forward else ()) + limit.backward_one(**asked)

    def two(_: None) -> object:
        return (limit.forward_two() if forward else ()) + limit.backward_two(**asked)

    return {"limit_one_product": Provider(one), "limit_two_products": Provider(two)}
