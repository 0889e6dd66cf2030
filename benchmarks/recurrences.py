"""gated_lstm with its recurrence computed in each of the two ways, beside the autotuner's choice, on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Provider


def ways(provider: Provider, batch: int, hidden: int, dtype: torch.dtype, device: torch.device) -> dict[str, Provider]:
    """{"steps" and, where it can run, "persistent": the provider, whose gated_lstm goes that way}; empty on a CPU."""
    if device.type != "cuda":
        return {}
    from stn_fast.kernels import gated_lstm, gated_lstm_persistent

    def asking(way: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            with gated_lstm.use(way):
                return function(*given)

        return run

    excluded = gated_lstm_persistent.why_not(batch, hidden, dtype, device)
    known = [gated_lstm.STEPS] if excluded else list(gated_lstm.WAYS)
    return {way: Provider(asking(way, provider.call), asking(way, provider.prepare)) for way in known}
