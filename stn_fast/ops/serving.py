"""Chooses the backend that computes an operation on given tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from stn_fast.dispatch import Name, choose

WhyNot = Callable[[Tensor], str | None]

# The kernels accumulate in float32, so plain torch computes float64.
UP_TO_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
GATED = MappingProxyType({"cpp": (torch.float32,), "triton": UP_TO_FLOAT32})
ELEMENTWISE = MappingProxyType({"cpp": UP_TO_FLOAT32, "triton": UP_TO_FLOAT32})


def serving(
    x: Tensor,
    *others: Tensor,
    takes: Mapping[str, tuple[torch.dtype, ...]] = GATED,
    without: Mapping[str, str] = MappingProxyType({}),
) -> Name:
    """The backend for tensors of the device and dtype of ``x``; see `stn_fast.dispatch.choose`.

    Empty tensors are computed by plain torch.
    """
    if not x.numel() or not all(map(Tensor.numel, others)):
        return "reference"
    return choose(x.device, x.dtype, takes, without)


class Implementations:
    """The backends in an operation's folder: modules ``plain`` for "reference", ``cpu`` for "cpp", and ``triton``.

    All have the same functions. A module may have ``why_not(h)``, which returns the reason if it can't compute tensors
    although their dtype is right.
    """

    def __init__(self, package: str, takes: Mapping[str, tuple[torch.dtype, ...]] = GATED) -> None:
        self._package, self._takes = package, takes
        self._loaded: dict[str, tuple[ModuleType, WhyNot | None]] = {}

    def serving(self, x: Tensor, *others: Tensor) -> ModuleType:
        """The module for the device and dtype of ``x``, as chosen by `serving`.

        The last of ``others`` is h. Raises RuntimeError if a backend was selected that can't compute these tensors.
        """
        name = serving(x, *others, takes=self._takes)
        module, why_not = self._loaded.get(name) or self._load(name)
        if why_not is not None and (reason := why_not(others[-1])):
            other = serving(x, *others, takes=self._takes, without={name: reason})
            return self._load(other)[0]
        return module

    def check(self, x: Tensor, *others: Tensor) -> None:
        """Raises if a backend was selected that can't compute these tensors, even if no backend is used here."""
        if not torch.compiler.is_compiling():
            self.serving(x, *others)

    def _load(self, name: str) -> tuple[ModuleType, WhyNot | None]:
        module = import_module(f"{self._package}.{_FILES[name]}")
        self._loaded[name] = module, getattr(module, "why_not", None)
        return self._loaded[name]


_FILES: Mapping[str, str] = {"reference": "plain", "cpp": "cpu", "triton": "triton"}
