"""Interleaved timing: what is compared takes turns in one process, so a noisy machine is fair to all.

Round after round, each provider has a turn, in an order that rotates by one every round. A turn is one call, or as
many as fill a millisecond, back to back as in a loop, and counts as their mean. A ratio is formed within a round,
where both sides saw the same machine, and its median over the rounds is what counts. Warm-up (compilation, autotuning,
first touches of memory) is left out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

# The GPU is kept busy this long while the host queues the work to be timed: events then time the device alone.
QUEUE_AHEAD_CYCLES = 4_000_000
# A turn shorter than this is filled with more calls.
TURN_MICROSECONDS = 1000.0
MAX_CALLS = 100


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. ``prepare`` runs untimed before every call and hands it a fresh state."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timings:
    """Microseconds of a call: one row per round, one column per provider in the order of ``names``."""

    names: tuple[str, ...]
    microseconds: NDArray[np.float64]

    def percentile(self, name: str, q: float) -> float:
        return float(np.percentile(self.of(name), q))

    def of(self, name: str) -> NDArray[np.float64]:
        return self.microseconds[:, self.names.index(name)]

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of name's time divided by to's time in the same round."""
        return float(np.median(self.of(name) / self.of(to)))


def time_call(provider: Provider, device: torch.device, calls: int = 1) -> float:
    """Microseconds of a call, the mean of `calls`: wall time on the CPU, time between two events on CUDA."""
    states = [provider.prepare() for _ in range(calls)]
    if device.type != "cuda":
        start = time.perf_counter_ns()
        for state in states:
            provider.call(state)
        return (time.perf_counter_ns() - start) / 1e3 / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(QUEUE_AHEAD_CYCLES)
    begin.record()
    for state in states:
        provider.call(state)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / calls


def calls_in_a_turn(provider: Provider, device: torch.device, warmup: int) -> int:
    """Warms the provider up and says how many calls fill a turn."""
    shortest = min(time_call(provider, device) for _ in range(warmup))
    return max(1, min(MAX_CALLS, round(TURN_MICROSECONDS / max(shortest, 1e-3))))


def interleave(
    providers: Mapping[str, Provider],
    device: torch.device,
    seconds: float = 5.0,
    min_rounds: int = 5,
    warmup: int = 3,
    max_rounds: int = 2000,
    trace: Callable[[str], None] | None = None,
) -> Timings:
    """Time all providers by turns until ``seconds`` have passed, and for ``min_rounds`` rounds at least.

    ``trace`` is told the name of every provider as its timed turn comes.
    """
    names = tuple(providers)
    calls = [calls_in_a_turn(provider, device, warmup) for provider in providers.values()]
    rows: list[list[float]] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while len(rows) < min_rounds or (time.perf_counter() < deadline and len(rows) < max_rounds):
            row = [0.0] * len(names)
            first = len(rows) % len(names)
            for turn in range(len(names)):
                column = (first + turn) % len(names)
                if trace is not None:
                    trace(names[column])
                row[column] = time_call(providers[names[column]], device, calls[column])
            rows.append(row)
    finally:
        if collecting:
            gc.enable()
    return Timings(names, np.array(rows))


def peak_bytes(provider: Provider, device: torch.device) -> int:
    """The most bytes that one call holds at once beyond what was held before it, its results included.

    Counts what goes through torch's allocators. On CUDA that is torch.cuda.max_memory_allocated; on the CPU
    the highest point of the running sum of the allocations and frees that torch.profiler sees.
    """
    provider.call(provider.prepare())
    state = provider.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        provider.call(state)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = provider.call(state)
    del result
    kineto = profiler.profiler.kineto_results if profiler.profiler is not None else None
    events = [event for event in kineto.events() if event.name() == "[memory]"] if kineto is not None else []
    events.sort(key=lambda event: event.start_ns())
    changes = np.cumsum([event.nbytes() for event in events])
    return max(0, int(changes.max())) if len(changes) else 0
