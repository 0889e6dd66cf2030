"""gated_lstm with its recurrence in one persistent launch, beside whatever else is measured on CUDA.

A row of it that is faster than the automatic choice's, on a device whose tests are green, is what an entry of PROVEN in
kernels/gated_lstm_persistent.py rests on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Provider


def persistent(
    provider: Provider, batch: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Provider]:
    """{"persistent": the provider, whose gated_lstm takes that recurrence}; empty where it can't run."""
    if device.type != "cuda":
        return {}
    from stn_fast.kernels.gated_lstm_persistent import use_persistent, why_not

    if why_not(batch, hidden, dtype, device) is not None:
        return {}

    def asking(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            with use_persistent():
                return function(*given)

        return run

    return {"persistent": Provider(asking(provider.call), asking(provider.prepare))}
