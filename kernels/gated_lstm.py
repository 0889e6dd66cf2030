"""The recurrence of a gated LSTM on a GPU: all steps of a layer, forward and backward, given x's share of the gates.

Three ways to compute it, and the autotuner chooses: launch by launch, a library product and a kernel at each step
("steps"); the same launches replayed as one CUDA graph ("graph"), which spares the host; and for small layers the whole
sequence in one launch. Weights' gradients are no part of it: they are single products after the loop, and the caller's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from . import gated_lstm_sequence as sequence
from .autotune import Problem, tuner
from .gated_lstm_steps import Backward, BackwardInputs, Forward, ForwardInputs, Pass, replay, run
from .launch import device_guard, refuse_float64

STEPS, GRAPH = "steps", "graph"


class Result(NamedTuple):
    """y (T, B, H), c_n (B, H), and where kept: cell states (T, B, H), Q = h_{t−1} Rᵀ (T, B, 4H)."""

    y: Tensor
    c_n: Tensor
    cells: Tensor | None
    response: Tensor | None


Choice: TypeAlias = str | triton.Config
Way: TypeAlias = Callable[[], tuple[Tensor | None, ...]]


def _check(gates: Tensor) -> None:
    refuse_float64("gated_lstm", gates=gates)
    if 2 * gates.shape[1] * gates.shape[2] > 2**31 - 1024:
        raise ValueError(f"gated_lstm: the numbers of a step are counted in 32 bits; got gates {tuple(gates.shape)}")


def _can_replay(gates: Tensor) -> bool:
    return gates.is_cuda and not torch.cuda.is_current_stream_capturing()


def _ways(
    gates: Tensor,
    key: tuple[object, ...],
    prepare: Callable[[], Pass],
    inputs: Any,
    at_once: Callable[[triton.Config], tuple[Tensor | None, ...]],
    own: Choice | None,
) -> dict[str, Way]:
    """All that may run here, by name. A configuration of the caller's own is one of them."""
    found: dict[str, Way] = {STEPS: partial(run, prepare, inputs)}
    if _can_replay(gates):
        found[GRAPH] = partial(replay, (*key, gates.dtype, *gates.shape), gates.device, prepare, inputs)
    capability = torch.cuda.get_device_capability(gates.device) if gates.is_cuda else (9, 0)
    shipped = sequence.configs(capability) if sequence.applies(gates.dtype, gates.shape[2] // 4) else []
    for config in [*shipped, own] if isinstance(own, triton.Config) else shipped:
        found[sequence.config_name(config)] = partial(at_once, config)
    return found


def _name(
    key: tuple[object, ...], gates: Tensor, ways: dict[str, Way], timed: Callable[[str], object], config: Choice | None
) -> str:
    """The way to take: what `config` says, or the one that is fastest when `timed` runs it."""
    if isinstance(config, triton.Config):
        return sequence.config_name(config)
    if config is None:
        steps, batch, wide = gates.shape
        precision = torch.backends.cuda.matmul.fp32_precision
        problem = Problem(("gated_lstm", *key, gates.dtype, precision), (steps, batch, wide // 4))
        return tuner.choose(problem, ways, timed, STEPS, gates.device)
    if config not in ways:
        raise ValueError(f"config={config!r} is none of {list(ways)}")
    return config


def forward(
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
    config: Choice | None = None,
) -> Result:
    """The layer's states from gates (T, B, 4H): x's share on entry and, where `save`, activated on return.

    h_0, c_0 (B, H); W, R (4H, H); scale, shift (B, 4H), the gates of hyperparameters h Gwᵀ and b + (h Gbᵀ) ⊙ r. All are
    contiguous and of one dtype. The cell state is float32 from step to step. `config` fixes the way; by default the
    autotuner chooses.
    """
    _check(gates)
    y = gates.new_empty(*gates.shape[:2], gates.shape[2] // 4)
    kept = torch.empty_like(y) if save else None
    inputs = ForwardInputs(
        gates, h_0, c_0, weight, response_weight, scale, shift, y, kept,
        torch.empty_like(gates) if save_response else None,
    )  # fmt: skip
    key = ("forward", reverse, save, save_response, shift is not None)

    def ways(inputs: ForwardInputs) -> dict[str, Way]:
        at_once = partial(sequence.forward, inputs, reverse)
        return _ways(gates, key, partial(Forward, inputs, reverse), inputs, at_once, config)

    def timed(name: str) -> object:
        return ways(inputs._replace(gates=gates.clone()))[name]()  # x's share is needed afterwards

    with device_guard(gates):
        found = ways(inputs)
        (c_n,) = found[_name(key, gates, found, timed, config)]()
    assert c_n is not None
    return Result(y, c_n, kept, inputs.response)


def backward(
    dy: Tensor,
    d_last_cell: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    reverse: bool,
    want_h_0: bool,
    config: Choice | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gates (T, B, 4H), before the activations, dh_0 (B, H) where wanted, dc_0 (B, H) in float32).

    From what `forward` kept and the gradients of y and c_n; `config` as there.
    """
    _check(gates)
    d_gates = torch.empty_like(gates)
    inputs = BackwardInputs(dy, gates, cells, c_0, weight, response_weight, scale, d_last_cell, d_gates)
    key = ("backward", reverse, want_h_0)
    at_once = partial(sequence.backward, inputs, reverse)
    with device_guard(gates):
        ways = _ways(gates, key, partial(Backward, inputs, reverse, want_h_0), inputs, at_once, config)
        dh_0, dc_0 = ways[_name(key, gates, ways, lambda name: ways[name](), config)]()
    assert dc_0 is not None
    return d_gates, dh_0 if want_h_0 else None, dc_0
