"""Checks of arguments that are tensors."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def check_tensor(who: str, name: str, value: object) -> None:
    """Raises TypeError if ``value`` is not a tensor."""
    if not isinstance(value, Tensor):
        hint = f"; convert it by torch.from_numpy({name})" if isinstance(value, np.ndarray) else ""
        kind = type(value)
        given = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        raise TypeError(f"{who}: {name} must be a torch.Tensor, got {given}{hint}")


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, of which a process has a part. Not isinstance, as its module takes long to import."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")
