"""Interleaved timing: providers take turns in one process, so that noise of the machine affects all of them equally.

In each round, every provider has one turn; the order rotates by one every round. A turn is one call, or as many calls
as fill a millisecond, and its time is their mean. Ratios are computed within a round, where the state of the machine is
similar, and their median over the rounds is reported. Warm-up (compilation, autotuning, first touches of memory) is not
timed. On CUDA, a turn replays a CUDA graph of the calls: see `benchmarks.cuda_timing`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

# A turn shorter than this is filled with more calls.
TURN_MICROSECONDS = 1000.0
MAX_CALLS = 100


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. ``prepare`` runs untimed before every call and hands it a fresh state.

    ``whole_step`` marks what a user waits for, host included: on CUDA its turns are timed by the host's clock, from an
    idle device to an idle device, and no graph is made of it. One that replays graphs of its own says in
    ``why_eager`` for which reasons it did not.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    whole_step: bool = False
    why_eager: Callable[[], Sequence[str]] | None = None


@dataclass(frozen=True)
class Turns:
    """A provider, warmed up and ready to be timed.

    Args:
        run: takes a turn, and returns the microseconds of one call.
        captured: whether the turn replays a CUDA graph; None where there is no choice (CPU, whole steps).
        host_us: microseconds that the host needs to issue one eager call; None on the CPU.
        host_bound: whether the device had to wait for the host, so that the turn is the host's time.
        why_not: the error that kept the calls from being captured.
    """

    run: Callable[[], float]
    captured: bool | None = None
    host_us: float | None = None
    host_bound: bool | None = None
    why_not: str | None = None


class Clock(Protocol):
    """Times providers on one kind of device."""

    def prepare(self, provider: Provider, warmup: int) -> Turns:
        """Calls the provider ``warmup`` times, and says how to time it from then on."""


@dataclass(frozen=True)
class Timings:
    """Microseconds of a call: one row per round, one column per provider in the order of ``names``.

    ``turns`` says how each was timed; ``failed`` has the error of each provider that could not be called at all.
    """

    names: tuple[str, ...]
    microseconds: NDArray[np.float64]
    turns: Mapping[str, Turns] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def percentile(self, name: str, q: float) -> float:
        return float(np.percentile(self.of(name), q))

    def of(self, name: str) -> NDArray[np.float64]:
        return self.microseconds[:, self.names.index(name)]

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of name's time divided by to's time in the same round."""
        return float(np.median(self.of(name) / self.of(to)))


class CpuClock:
    """Wall time of calls back to back."""

    def prepare(self, provider: Provider, warmup: int) -> Turns:
        calls = calls_in_a_turn(min(self._time(provider, 1) for _ in range(warmup)))
        return Turns(lambda: self._time(provider, calls))

    @staticmethod
    def _time(provider: Provider, calls: int) -> float:
        states = [provider.prepare() for _ in range(calls)]
        start = time.perf_counter_ns()
        for state in states:
            provider.call(state)
        return (time.perf_counter_ns() - start) / 1e3 / calls


def calls_in_a_turn(microseconds: float, turn: float = TURN_MICROSECONDS) -> int:
    """How many calls that take so long fill a turn of so many microseconds."""
    return max(1, min(MAX_CALLS, round(turn / max(microseconds, 1e-3))))


def clock_of(device: torch.device) -> Clock:
    """What times providers on ``device``."""
    if device.type != "cuda":
        return CpuClock()
    from benchmarks.cuda_timing import Cuda, CudaClock

    return CudaClock(Cuda(device))


def interleave(
    providers: Mapping[str, Provider],
    device: torch.device,
    seconds: float = 5.0,
    min_rounds: int = 5,
    warmup: int = 3,
    max_rounds: int = 2000,
    trace: Callable[[str], None] | None = None,
    clock: Clock | None = None,
) -> Timings:
    """Time all providers by turns until ``seconds`` have passed, and for ``min_rounds`` rounds at least.

    ``trace`` is told the name of every provider as its timed turn comes; ``clock`` is what times them, that of
    ``device`` by default. A provider whose warm-up raises an error takes no part: its error is in ``Timings.failed``.
    """
    clock = clock or clock_of(device)
    turns: dict[str, Turns] = {}
    failed: dict[str, str] = {}
    for name, provider in providers.items():
        try:
            turns[name] = clock.prepare(provider, warmup)
        except Exception as error:  # one provider that fails must not cost the others their rows
            failed[name] = first_line(error)
    names = tuple(turns)
    rows: list[list[float]] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while names and (len(rows) < min_rounds or (time.perf_counter() < deadline and len(rows) < max_rounds)):
            row = [0.0] * len(names)
            first = len(rows) % len(names)
            for turn in range(len(names)):
                column = (first + turn) % len(names)
                if trace is not None:
                    trace(names[column])
                row[column] = turns[names[column]].run()
            rows.append(row)
    finally:
        if collecting:
            gc.enable()
    return Timings(names, np.array(rows), turns, failed)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


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


def launches(provider: Provider, device: torch.device) -> int | None:
    """How many kernels, copies and fills a call runs on the device; None on the CPU, or where no profiler sees them."""
    if device.type != "cuda":
        return None
    state = provider.prepare()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        provider.call(state)
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ()) or None
