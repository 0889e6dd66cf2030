"""Detects whether OpenMP starts as many threads as torch expects, and guards against fewer.

oneDNN plans its work for the threads that OpenMP promises. If it gets fewer, some of its kernels leave part of the
result unwritten, and others wait for ever. Seen in torch 2.13 on two threads with OMP_THREAD_LIMIT=1: oneDNN's products
and a training nn.LSTM gave NaN, nn.Conv2d gave wrong gradients of its filters, and never returned for channels_last
images.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def full_team() -> bool:
    """Whether torch's parallel regions get as many threads as they are promised, in this thread and at this moment.

    They may not with OMP_THREAD_LIMIT, OMP_DYNAMIC or OMP_MAX_ACTIVE_LEVELS=0, inside a parallel region, or after
    another library has called omp_set_dynamic(1). False if OpenMP can't be queried.
    """
    return _ask_openmp_of_torch()()


_ASKED = (
    "omp_get_max_threads",
    "omp_get_dynamic",
    "omp_get_thread_limit",
    "omp_get_active_level",
    "omp_get_max_active_levels",
)


@cache
def _ask_openmp_of_torch() -> Callable[[], bool]:
    """The check of `full_team` for the OpenMP runtime that torch uses; the core may be linked with another one."""
    try:
        from stn_fast import _C

        # Symbols are looked up in the libraries that libtorch_cpu is linked with.
        torch_cpu = ctypes.CDLL(str(next(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"))))
        functions = [getattr(torch_cpu, name) for name in _ASKED]
    except (ImportError, StopIteration, OSError, AttributeError):
        return lambda: False
    return partial(_C.full_team, *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))


def misled(x: Tensor) -> bool:
    """Whether torch's own convolution or LSTM of x, whose backward pass can't be guarded, could be wrong."""
    return not (x.is_cuda or torch.compiler.is_compiling() or full_team())


def watch(*results: Tensor) -> None:
    """Makes the backward pass from `results` of torch's own layers raise if the team is no longer full then."""
    for result in results:
        if result.requires_grad and result.device.type == "cpu" and not torch.compiler.is_compiling():
            result.register_hook(_check_team)


def _check_team(gradient: Tensor) -> None:
    if not full_team():
        raise RuntimeError(
            "OpenMP starts fewer threads than it did in the forward pass (after omp_set_dynamic or the like), and "
            "torch's own layers would give wrong gradients: call torch.set_num_threads(1) before the forward pass"
        )


class _WithoutOneDNN:
    """oneDNN is off while any thread is inside, because the setting belongs to the process."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = bool(torch.backends.mkldnn.enabled)
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.mkldnn.enabled = self._before  # type: ignore[assignment]


_without_onednn = _WithoutOneDNN()


def any_team(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates `compute`, which calls torch's convolutions or products, to avoid oneDNN if the team isn't full."""

    @wraps(compute)
    def run(*arguments: Any, **options: Any) -> Result:
        if full_team():
            return compute(*arguments, **options)
        with _without_onednn:
            return compute(*arguments, **options)

    return run
