"""What the gated operations ask of their operands before a kernel sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_operands(
    operation: str,
    wanted: Mapping[str, tuple[Tensor | None, Sequence[int]]],
    weight: Tensor,
    weight_name: str = "weight",
    /,
    **beside: Tensor | int,
) -> None:
    """Raises ValueError about the first misfit of ``wanted``, {name: (tensor, its shape)}; None is no misfit.

    All are to have the dtype of ``weight`` and to be on its device. ``beside`` is what the shapes follow from.
    """
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != tuple(shape):
            given = [f"{key} {tuple(t.shape)}" if isinstance(t, Tensor) else f"{key}={t}" for key, t in beside.items()]
            raise ValueError(
                f"{operation}: {name} must be {tuple(shape)} to fit {', '.join(given[:-1])} and {given[-1]}; "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}, {weight_name} {weight.dtype} on "
                f"{weight.device}; they must agree (cast one: {name}.to({weight_name}))"
            )
