"""Argument checks of operations that draw random numbers: RNG coordinates, and one strength per example."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stn_fast.checks import whole_number
from stn_fast.ops.transforms import in_function_transform


class Coordinates(NamedTuple):
    """The RNG coordinates of a draw, other than the stream, the example and the element."""

    step: Tensor
    seed: int
    first_example: int


def check_coordinates(
    operation: str, device: torch.device, seed: int, step: Tensor | int, first_example: int
) -> Coordinates:
    """The coordinates, with `step` as a tensor on the device; raises ValueError naming a wrong one.

    NumPy integers are accepted. The value of a step that is a tensor is checked by `step_number` rather than here.
    """
    seed = whole_number(operation, "seed", seed, 0)
    first_example = whole_number(operation, "first_example", first_example, 0)
    if not isinstance(step, Tensor):
        number = whole_number(operation, "step", step, 0, otherwise=f", or a 0-dim int64 tensor on {device}")
        return Coordinates(torch.full((), number, dtype=torch.int64, device=device), seed, first_example)
    if step.ndim != 0 or step.dtype != torch.int64 or step.device != device:
        raise ValueError(
            f"{operation}: step must be an int or a 0-dim int64 tensor on {device}, "
            f"got {tuple(step.shape)} {step.dtype} on {step.device}"
        )
    return Coordinates(step, seed, first_example)


def step_number(operation: str, step: Tensor) -> int:
    """The value of a step from `check_coordinates`, for a draw on the CPU; raises ValueError if it is below 0."""
    number = int(step)
    if number < 0:
        raise ValueError(f"{operation}: step must be >= 0, got {number}")
    return number


def check_strength(operation: str, name: str, strength: Tensor, x: Tensor, batch_size: int, stream: int) -> int:
    """`stream` as an int; raises ValueError if it is reserved, or the strength isn't one float32 per example."""
    if not isinstance(strength, Tensor):
        raise ValueError(
            f"{operation}: {name} must be a tensor ({batch_size},) float32, one entry per example, got {strength!r}"
        )
    if strength.shape != (batch_size,) or strength.dtype != torch.float32 or strength.device != x.device:
        raise ValueError(
            f"{operation}: {name} must be ({batch_size},) float32 on {x.device}, one entry per example of x "
            f"{tuple(x.shape)}, got {tuple(strength.shape)} {strength.dtype} on {strength.device}"
        )
    return check_stream(operation, stream)


def check_stream(operation: str, stream: int) -> int:
    """`stream` as an int, for an operation about to draw; raises as `stream_number` and `check_randomness`."""
    check_randomness(operation)
    return stream_number(operation, stream)


def stream_number(operation: str, stream: int) -> int:
    """`stream` as an int; raises ValueError if it is reserved or not a 32-bit number."""
    return whole_number(operation, "stream", stream, 1, 2**32, " (0 draws the hyperparameters)")


def check_randomness(operation: str) -> None:
    """Raises RuntimeError inside torch.vmap unless it allows that all slices draw the same numbers."""
    if torch.compiler.is_compiling() or not in_function_transform():
        return
    if torch._C._current_graph_task_id() != -1:  # a backward pass draws again what its forward pass drew
        return
    for interpreter in torch._C._functorch.get_interpreter_stack() or ():
        if interpreter.key() != torch._C._functorch.TransformType.Vmap:
            continue
        randomness = torch._C._functorch.CVmapInterpreterPtr(interpreter).randomness()
        if randomness != torch._C._functorch.RandomnessType.Same:
            raise RuntimeError(
                f"{operation}: inside torch.vmap every slice draws the same numbers, which are fixed by seed, step and "
                f"example: set randomness='same', got {str(randomness).rpartition('.')[2].lower()!r}"
            )
