"""The choice of the backend that computes an operation: C++ core, Triton kernels, or plain PyTorch reference.

By default it is the fastest one that runs on the tensor's device; ``backends()`` lists which ones run here, and why the
others don't. ``use_backend("reference")`` selects one by name; it is an error if that one is missing.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, Protocol

Name = Literal["cpp", "triton", "reference"]
NAMES: tuple[Name, ...] = ("cpp", "triton", "reference")

_requested: ContextVar[str] = ContextVar("stn_fast_backend", default="auto")


class _Device(Protocol):
    """What ``choose`` needs of a ``torch.device``."""

    @property
    def type(self) -> str: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Backend:
    """Whether a backend runs here, and a description: what it runs on, or why it doesn't run."""

    available: bool
    description: str

    def __repr__(self) -> str:
        return f"{'available' if self.available else 'missing'}: {self.description}"


class Backends(dict[str, Backend]):
    """``{name: Backend}``, printed with one backend per line."""

    def __repr__(self) -> str:
        return "\n".join(f"{name:<10} {status!r}" for name, status in self.items())


@cache
def _import_failure(module: str) -> str | None:
    """None if ``module`` can be imported, else the reason why not; checked once per process."""
    try:
        # torch comes first, so that the C++ core shares the OpenMP runtime and the threads of torch.
        importlib.import_module("torch")
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _automatic(device: _Device) -> Name:
    if device.type == "cpu" and _import_failure("stn_fast._C") is None:
        return "cpp"
    if device.type == "cuda" and _import_failure("triton") is None:
        return "triton"
    return "reference"


def triton_may_serve() -> bool:
    """Whether Triton may compute some operation of this thread: it was asked for, or CUDA is available."""
    return _requested.get() == "triton" or _cuda_is_available()


@cache
def _cuda_is_available() -> bool:
    torch: Any = importlib.import_module("torch")
    return torch.cuda.is_available()


def _why_not(name: str, device_type: str) -> str | None:
    """Why the backend called ``name`` can't compute on tensors of this device type; None if it can."""
    if name == "cpp":
        if failure := _import_failure("stn_fast._C"):
            return f"the C++ core stn_fast._C does not import ({failure})"
        if device_type != "cpu":
            return f"the C++ core computes on CPU tensors, and this one is on {device_type!r}"
    if name == "triton":
        if failure := _import_failure("triton"):
            return f"Triton does not import ({failure})"
        if device_type != "cuda" and not _interpreting():
            return (
                f"Triton kernels compute on CUDA tensors, and this one is on {device_type!r} "
                "(TRITON_INTERPRET=1 interprets them on the CPU, slowly, for tests)"
            )
    return None


def choose(
    device: _Device,
    dtype: object = None,
    takes: Mapping[str, Collection[object]] = MappingProxyType({}),
    without: Mapping[str, str] = MappingProxyType({}),
) -> Name:
    """The backend for tensors of ``dtype`` on ``device``: the one selected by ``use_backend``, else the fastest here.

    Args:
        takes: the dtypes that each backend supports; a backend that isn't named supports all.
        without: {backend: reason} for backends that can't compute these tensors for another reason.

    Raises:
        RuntimeError: the selected backend can't compute these tensors; the message says why. An automatic choice never
            raises.
    """
    name = _requested.get()
    if name == "auto":
        automatic = _automatic(device)
        return automatic if dtype in takes.get(automatic, (dtype,)) and automatic not in without else "reference"
    reason = _why_not(name, device.type) or without.get(name)
    if reason is None and dtype not in takes.get(name, (dtype,)):
        reason = f"here it computes {' and '.join(map(str, takes[name]))}, and this tensor is {dtype}"
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} was asked for and can't be used: {reason}. use_backend('auto') chooses one that runs."
        )
    return name  # type: ignore[return-value]


def chosen(device: _Device) -> tuple[Name, str | None]:
    """(the backend that computes on ``device`` now, why it is not the fast one for this device, or None if it is)."""
    name = choose(device)
    fast = {"cpu": "cpp", "cuda": "triton"}.get(device.type, name)
    if name == fast:
        return name, None
    return name, _why_not(fast, device.type) or f"use_backend({name!r}) asks for it"


@contextmanager
def use_backend(name: Literal["auto", "cpp", "triton", "reference"]) -> Iterator[None]:
    """Within the ``with`` block, operations run on the backend called ``name``; the default elsewhere is "auto".

    An operation that this backend can't compute, because of the device, the dtype or a size, raises RuntimeError. Three
    things use plain torch on every backend: empty tensors, forward-mode AD and torch.func transforms, and layers with
    one shared h, which are folded into plain layers.

    The choice applies to the current thread or task (a ``contextvars`` variable): a thread started inside the block
    begins with "auto", and so do the threads in which autograd runs a CUDA backward. Call ``backward()`` of CPU tensors
    inside the block, and don't rely on the choice in the backward of CUDA tensors.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown; use 'auto', {', '.join(map(repr, NAMES))}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def _cpp() -> Backend:
    if failure := _import_failure("stn_fast._C"):
        return Backend(
            False, f"stn_fast._C does not import ({failure}); `pip install .` builds it with a C++17 compiler"
        )
    core: Any = importlib.import_module("stn_fast._C")
    torch: Any = importlib.import_module("torch")
    threads = f"OpenMP, {torch.get_num_threads()} threads" if core.openmp() else "one thread, built without OpenMP"
    products: Any = importlib.import_module("stn_fast.ops.products")
    return Backend(True, f"CPU tensors, {core.isa()} instructions, products by {products.description()}, {threads}")


def _triton() -> Backend:
    if failure := _import_failure("triton"):
        return Backend(False, f"Triton does not import ({failure}); `pip install triton` on Linux")
    triton: Any = importlib.import_module("triton")
    torch: Any = importlib.import_module("torch")
    version = f"Triton {triton.__version__}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Backend(True, f"CUDA tensors, {version}, {torch.cuda.get_device_name()} (sm_{major}{minor})")
    if _interpreting():
        return Backend(True, f"CPU tensors in the interpreter (TRITON_INTERPRET=1), {version}")
    built_for = torch.version.cuda or torch.version.hip
    reason = f"torch is built for {built_for}, but sees no device" if built_for else "this torch is a CPU build"
    return Backend(False, f"{version} imports, but there is no CUDA device: {reason}")


def backends() -> Backends:
    """The backends that run here, and why the others don't: ``{"cpp": ..., "triton": ..., "reference": ...}``."""
    torch: Any = importlib.import_module("torch")
    reference = Backend(True, f"every device and dtype, plain PyTorch {torch.__version__}")
    return Backends(cpp=_cpp(), triton=_triton(), reference=reference)
