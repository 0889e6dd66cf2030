"""The recurrence of a gated LSTM on a GPU: all steps of a layer, forward and backward, given x's share of the gates.

Two ways to compute it: "steps", a library product and a kernel at each step, serves every size and dtype; "persistent",
the whole sequence in one launch, serves bfloat16 and sizes that fit the device. Where both can, the autotuner chooses.
Weights' gradients are no part of it: they are single products after the loop, and the caller's.

Before the persistent way is used, it is tried once in a process for a device, sizes and options: on drawn numbers of a
few time steps, every result must obey the 2x rule, an error of at most twice that of "steps" against "steps" in
float32. Where one doesn't, a warning names it and "steps" is taken. The trial waits for the device once; inside a CUDA
graph's capture, where it can't be made, "steps" is taken unless it has been made before.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gated_lstm_persistent as persistent
from . import gated_lstm_steps as steps
from .autotune import Problem, Refused, capturing, tuner
from .launch import device_guard, refuse_float64

STEPS, PERSISTENT = "steps", "persistent"
TRIAL_STEPS = 16
# Of fewer numbers in a state, either way's may have by far the smaller error by chance.
TRIAL_NUMBERS = 64


class Way(NamedTuple):
    """The two functions of one way to compute the recurrence."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor | None, Tensor]]


WAYS = {STEPS: Way(steps.forward, steps.backward), PERSISTENT: Way(persistent.forward, persistent.backward)}

_asked_for: str | None = None
# What was wrong in the trial of a call's kind, None where nothing was.
_tried: dict[tuple[object, ...], str | None] = {}


@contextmanager
def use(way: str) -> Iterator[None]:
    """Within the `with` block, gated_lstm on CUDA computes the recurrence this way, or raises RuntimeError.

    Holds for the whole process, as autograd runs the backward of CUDA tensors in threads of its own.
    """
    global _asked_for
    if way not in WAYS:
        raise ValueError(f"gated_lstm: way must be one of {list(WAYS)}, got {way!r}")
    before, _asked_for = _asked_for, way
    try:
        yield
    finally:
        _asked_for = before


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
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y (T, B, H), c_n (B, H), cell states (T, B, H) with `save`, Q = h_{t−1} Rᵀ (T, B, 4H) with `save_response`).

    gates (T, B, 4H) hold x's share on entry and, where `save`, are activated in place. h_0, c_0 (B, H); W, R (4H, H);
    scale, shift (B, 4H), the gates of hyperparameters h Gwᵀ and b + (h Gbᵀ) ⊙ r. All are contiguous and of one dtype.
    The cell state is float32 from step to step.

    With a projection B (k, H) the response is R = A B, response_weight is A (4H, k), and u = h_{t−1} Bᵀ (T, B, k) is
    kept in the place of Q. Steps alone serve it.
    """
    operands = (gates, h_0, c_0, weight, response_weight, scale, shift, reverse, save, save_response)
    if projection is not None:
        _check_steps_alone(gates)
        with device_guard(gates):
            return steps.forward(*operands, projection)
    with device_guard(gates):
        return WAYS[_way("forward", gates, operands)].forward(*operands)


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
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gates (T, B, 4H), before the activations, dh_0 (B, H) where wanted, dc_0 (B, H) in float32).

    From what `forward` kept and the gradients of y and c_n.
    """
    operands = (dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, reverse, want_h_0)
    if projection is not None:
        _check_steps_alone(gates)
        with device_guard(gates):
            return steps.backward(*operands, projection)
    with device_guard(gates):
        return WAYS[_way("backward", gates, operands)].backward(*operands)


def _check_gates(gates: Tensor) -> None:
    _, batch, wide = gates.shape
    refuse_float64("gated_lstm", gates=gates)
    if 8 * batch * (wide // 4 + steps.ROW) > 2**31 - 1024:
        raise ValueError(f"gated_lstm: the numbers of a step are counted in 32 bits; got gates {tuple(gates.shape)}")


def _check_steps_alone(gates: Tensor) -> None:
    """Of a response of low rank, which the persistent recurrence doesn't compute."""
    _check_gates(gates)
    if _asked_for == PERSISTENT:
        raise RuntimeError(
            "the persistent recurrence of gated_lstm was asked for and can't be used: the response is of low rank"
        )


def _way(direction: str, gates: Tensor, operands: tuple[Any, ...]) -> str:
    """The way to take: what was asked for, or the one that is fastest and known to be right."""
    (length, batch, wide), dtype, device = gates.shape, gates.dtype, gates.device
    hidden = wide // 4
    _check_gates(gates)
    if _asked_for == STEPS:
        return STEPS
    reason = persistent.why_not(batch, hidden, dtype, device)
    if batch * hidden < TRIAL_NUMBERS:
        reason = reason or f"{batch} examples of {hidden} hidden units are too few numbers to try it on"
    if _asked_for == PERSISTENT:
        if reason := reason or _what_is_wrong(direction, operands):
            raise RuntimeError(f"the persistent recurrence of gated_lstm was asked for and can't be used: {reason}")
        return PERSISTENT
    if reason is not None:
        return STEPS

    def timed(way: str) -> object:
        if way == PERSISTENT and (wrong := _what_is_wrong(direction, operands)):
            raise Refused(wrong)
        copies = (operand.clone() if operand is gates else operand for operand in operands)  # forward replaces them
        return getattr(WAYS[way], direction)(*copies)

    flags = (operand for operand in operands if not isinstance(operand, Tensor))
    problem = Problem((f"gated_lstm {direction}", *flags, dtype), (length, batch, hidden))
    fastest = tuner.choose(problem, WAYS, timed, STEPS, device)
    return STEPS if fastest == PERSISTENT and _what_is_wrong(direction, operands) else fastest


def _what_is_wrong(direction: str, operands: tuple[Any, ...]) -> str | None:
    """What speaks against the persistent way for calls like this one, from a trial; None where nothing does."""
    device = next(operand.device for operand in operands if isinstance(operand, Tensor))
    kind = (direction, device, *(tuple(o.shape[-2:]) if isinstance(o, Tensor) else o for o in operands))
    if kind not in _tried:
        if capturing():
            return "it must be called once before a CUDA graph's capture"
        try:
            wrong = _try(direction, _drawn_like(operands, device))
        except torch.OutOfMemoryError:
            return "there is no memory to try it at the moment"
        except Exception as error:  # whatever keeps it from running, "steps" needs none of it
            wrong = f"{type(error).__name__}: {error}"
        _tried[kind] = wrong
        if wrong is not None:
            warnings.warn(
                f"gated_lstm computes step by step, as the persistent recurrence fails: {wrong}", stacklevel=2
            )
    return _tried[kind]


def _drawn_like(operands: tuple[Any, ...], device: torch.device) -> list[Any]:
    """Numbers in (−1, 1), those of W and R in ±1/√H, in place of the operands; sequences of TRIAL_STEPS time steps."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        shape = (TRIAL_STEPS, *tensor.shape[1:]) if tensor.ndim == 3 else tensor.shape
        numbers = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1)
        is_weight = tensor.ndim == 2 and tensor.shape[0] == 4 * tensor.shape[1]
        return (numbers * tensor.shape[1] ** -0.5 if is_weight else numbers).to(tensor.dtype)

    return [drawn(operand) if isinstance(operand, Tensor) else operand for operand in operands]


def _try(direction: str, operands: list[Any]) -> str | None:
    """Which results of the persistent way break the 2x rule, with their errors; None where all obey it."""

    def results(way: str, dtype: torch.dtype) -> dict[str, Tensor]:
        copies = [o.to(dtype, copy=True) if isinstance(o, Tensor) else o for o in operands]
        found = getattr(WAYS[way], direction)(*copies)
        names = ("d_gates", "dh_0", "dc_0") if direction == "backward" else ("y", "c_n", "cells", "response")
        by_name = dict(zip(names, found, strict=True)) | ({} if direction == "backward" else {"gates": copies[0]})
        return {name: result.float() for name, result in by_name.items() if result is not None}

    exact, rounded = (results(STEPS, dtype) for dtype in (torch.float32, torch.bfloat16))
    got = results(PERSISTENT, torch.bfloat16)
    errors = [
        (of[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-30) for name in exact for of in (got, rounded)
    ]
    broken = [
        f"{name} (error {error:.1e}, at most {2 * of_steps + 1e-6:.1e} is right)"
        for name, (error, of_steps) in zip(exact, torch.stack(errors).view(-1, 2).tolist(), strict=True)
        if not error <= 2 * of_steps + 1e-6
    ]
    return f"wrong results: {', '.join(broken)}" if broken else None
