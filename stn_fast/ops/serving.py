"""Which backend computes an operation on given tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from stn_fast.dispatch import Name, choose

WhyNot = Callable[[Tensor], str | None]

# The kernels accumulate in float32, so float64 is left to plain torch.
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
GATED = MappingProxyType({"cpp": (torch.float32,), "triton": UP_TO_FLOAT32})
ELEMENTWISE = MappingProxyType({"cpp": UP_TO_FLOAT32, "triton": UP_TO_FLOAT32})


def serving(
    x: Tensor,
    *others: Tensor,
    takes: Mapping[str, tuple[torch.dtype, ...]] = GATED,
    without: Mapping[str, str] = MappingProxyType({}),
) -> Name:
    """The backend for tensors on the device of ``x`` and of its dtype; see `stn_fast.dispatch.choose`.

    Plain torch serves empty tensors.
    """
    if not x.numel() or not all(map(Tensor.numel, others)):
        return "reference"
    return choose(x.device, x.dtype, takes, without)


class Implementations:
    """The modules of an operation's folder that compute it: ``plain`` for "reference", ``cpu`` for "cpp", ``triton``.

    Each has the same functions. One may say by ``why_not(h)`` why it can't serve tensors that are of the right dtype.
    """

    def __init__(self, package: str, takes: Mapping[str, tuple[torch.dtype, ...]] = GATED) -> None:
        self._package, self._takes = package, takes
        self._loaded: dict[str, tuple[ModuleType, WhyNot | None]] = {}

    def serving(self, x: Tensor, *others: Tensor) -> ModuleType:
        """The module that computes on the device of ``x`` and in its dtype, as `serving` chooses.

        The last of ``others`` is h. Raises RuntimeError where a backend was asked for that can't serve.
        """
        name = serving(x, *others, takes=self._takes)
        module, why_not = self._loaded.get(name) or self._load(name)
        if why_not is not None and (reason := why_not(others[-1])):
            other = serving(x, *others, takes=self._takes, without={name: reason})
            return self._load(other)[0]
        return module

    def check(self, x: Tensor, *others: Tensor) -> None:
        """Raises where a backend was asked for that can't serve, though none of them computes here."""
        if not torch.compiler.is_compiling():
            self.serving(x, *others)

    def _load(self, name: str) -> tuple[ModuleType, WhyNot | None]:
        module = import_module(f"{self._package}.{_FILES[name]}")
        self._loaded[name] = module, getattr(module, "why_not", None)
        return self._loaded[name]


_FILES: Mapping[str, str] = {"reference": "plain", "cpp": "cpu", "triton": "triton"}
