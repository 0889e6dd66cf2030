"""Precision of the matrix products, convolutions and LSTMs of a step: ``fp32``, ``tf32`` or ``bf16``.

One setting applies to all of them. By default, torch computes float32 matrix products on CUDA in float32, but
convolutions and LSTMs in TF32; the kernels of this package follow torch's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from stn_fast.errors import did_you_mean
from stn_fast.ops.casts import casts_once
from stn_fast.training.config import PRECISIONS, Precision

_BACKENDS: Any = torch.backends


def check_precision(who: str, precision: Precision) -> Precision:
    """Returns ``precision``; raises ValueError if it is unknown."""
    if precision not in PRECISIONS:
        raise ValueError(f"{who}: precision {precision!r}: {did_you_mean(str(precision), PRECISIONS)}")
    return precision


@contextmanager
def autocasting(precision: Precision, device: torch.device) -> Iterator[None]:
    """For ``bf16``, autocast to bfloat16 that casts each parameter only once; otherwise does nothing."""
    with ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            stack.enter_context(casts_once())
        yield


@contextmanager
def float32_products(precision: Precision) -> Iterator[None]:
    """Inside, float32 matrix products, convolutions and LSTMs use TF32 for ``tf32``, and float32 otherwise.

    These settings belong to the process, so they affect other threads too. They are restored afterwards.
    """
    value = "tf32" if precision == "tf32" else "ieee"
    settings = _settings()
    before = [setting.fp32_precision for setting in settings]
    if all(was == value for was in before):
        yield
        return
    # torch.compile reads the older settings, and torch refuses to read them if only the newer ones were changed. So
    # both are set, the older ones first, because they also write the newer ones.
    cpu = _BACKENDS.mkldnn.matmul
    before_cpu = cpu.fp32_precision
    older = [(put, read) for put, get in _OLDER if (read := _readable(get)) is not None]
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    for setting in settings:
        setting.fp32_precision = value
    try:
        yield
    finally:
        for put, read in older:
            put(read)
        for setting, was in zip([*settings, cpu], [*before, before_cpu], strict=True):
            _put_back(setting, was)


def _settings() -> list[Any]:
    return [_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn]


def _put_back(setting: Any, was: str) -> None:
    setting.fp32_precision = "none"  # as torch.backends.fp32_precision says
    if setting.fp32_precision != was:
        setting.fp32_precision = was


def _set_allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


# (set, get) of each older setting.
_OLDER: list[tuple[Callable[[Any], None], Callable[[], Any]]] = [
    (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision),
    (_set_allow_tf32, lambda: torch.backends.cudnn.allow_tf32),
]


def _readable(get: Callable[[], Any]) -> Any:
    """An older setting; None if torch refuses to read it because only the newer ones were changed."""
    try:
        return get()
    except RuntimeError:
        return None
