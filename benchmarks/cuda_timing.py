"""Timing on CUDA by replays of a CUDA graph, which gives the time of the device without Python.

The calls of a turn are captured into one graph, and its replay is timed between two events. The host's time to issue
one eager call is measured separately. A provider that can't be captured is timed eagerly, after a sleep on the device
that is long enough for the host to queue all launches; if no sleep is (a CUDA stream holds about a thousand pending
launches), the row says that the time is the host's.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.timing import Provider, Turns, calls_in_a_turn, first_line

# The fastest clock of today's GPUs: what torch.cuda._sleep is told to wait never comes out shorter than was asked.
CYCLES_PER_MICROSECOND = 2000
SHORTEST_SLEEP = 500.0
LONGEST_SLEEP = 400_000.0
HOST_CALLS = 5

Run = Callable[[], object]


class DeviceTimer(Protocol):
    """What timing needs of a device, so that tests can put a simulated one in its place. Times are microseconds."""

    def now(self) -> float:
        """The host's clock."""

    def synchronize(self) -> None:
        """Waits until the device is idle."""

    def between_events(self, run: Run, sleep: float) -> tuple[float, bool]:
        """Time on the device from the first to the last of what ``run`` queues, the device asleep meanwhile.

        Also whether it still slept when everything was queued.
        """

    def warm(self, run: Run) -> None:
        """Runs on the CUDA stream that captures."""

    def capture(self, prepare: Callable[[], Any], call: Callable[[Any], object], calls: int) -> Run:
        """What replays ``calls`` calls, each on a state of its own, prepared beforehand; raises where it can't."""


class CudaClock:
    """Times a provider as a graph, or eagerly where there can't be one, or a whole step by the host's clock."""

    def __init__(self, device: DeviceTimer):
        self.device = device

    def prepare(self, provider: Provider, warmup: int) -> Turns:
        for _ in range(warmup):
            provider.call(provider.prepare())
        host = statistics.median(self._host(provider) for _ in range(HOST_CALLS))
        if provider.whole_step:
            calls = calls_in_a_turn(self._wall(provider, 1))
            return Turns(lambda: self._wall(provider, calls), None, host)
        try:
            self.device.warm(lambda: provider.call(provider.prepare()))
            return self._captured(provider, host)
        except Exception as error:  # torch raises errors of many kinds from a capture, and the row must say which
            return self._eager(provider, host, first_line(error))

    def _captured(self, provider: Provider, host: float) -> Turns:
        sleep = min(max(2 * host, SHORTEST_SLEEP), LONGEST_SLEEP)
        once, hidden = self.device.between_events(self._calls(provider, 1)(), sleep)
        calls = calls_in_a_turn(once) if hidden else 1
        replay = self.device.capture(provider.prepare, provider.call, calls)
        replay()  # an error of the device shows here, and not in a later provider's turn
        self.device.synchronize()
        _, hidden, sleep = self._hidden(lambda: replay, SHORTEST_SLEEP)
        return Turns(lambda: self.device.between_events(replay, sleep)[0] / calls, True, host, not hidden)

    def _eager(self, provider: Provider, host: float, why_not: str) -> Turns:
        once, hidden, sleep = self._hidden(self._calls(provider, 1), 2 * host)
        calls = calls_in_a_turn(once) if hidden else 1
        make = self._calls(provider, calls)
        if calls > 1:
            _, hidden, sleep = self._hidden(make, 2 * host * calls)
        return Turns(lambda: self.device.between_events(make(), sleep)[0] / calls, False, host, not hidden, why_not)

    @staticmethod
    def _calls(provider: Provider, calls: int) -> Callable[[], Run]:
        """Makes what calls the provider so often, each time on fresh states."""

        def make() -> Run:
            states = [provider.prepare() for _ in range(calls)]

            def run() -> None:
                for state in states:
                    provider.call(state)

            return run

        return make

    def _hidden(self, make: Callable[[], Run], sleep: float) -> tuple[float, bool, float]:
        """Time, whether a sleep hid the host from it, and the sleep: the shortest that did, by doubling."""
        sleep = min(max(sleep, SHORTEST_SLEEP), LONGEST_SLEEP)
        while True:
            microseconds, hidden = self.device.between_events(make(), sleep)
            if hidden or sleep >= LONGEST_SLEEP:
                return microseconds, hidden, sleep
            sleep = min(2 * sleep, LONGEST_SLEEP)

    def _host(self, provider: Provider) -> float:
        state = provider.prepare()
        self.device.synchronize()
        start = self.device.now()
        provider.call(state)
        microseconds = self.device.now() - start
        self.device.synchronize()
        return microseconds

    def _wall(self, provider: Provider, calls: int) -> float:
        states = [provider.prepare() for _ in range(calls)]
        self.device.synchronize()
        start = self.device.now()
        for state in states:
            provider.call(state)
        self.device.synchronize()
        return (self.device.now() - start) / calls


@lru_cache
def freeze_garbage_collection() -> None:
    """Takes all that is there now from the collections that torch makes before each capture: they take a while."""
    gc.collect()
    gc.freeze()


class Cuda:
    """A CUDA device, as `DeviceTimer` describes it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        freeze_garbage_collection()

    def now(self) -> float:
        return time.perf_counter_ns() / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def between_events(self, run: Run, sleep: float) -> tuple[float, bool]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        torch.cuda._sleep(int(sleep * CYCLES_PER_MICROSECOND))
        begin.record()
        run()
        end.record()
        hidden = not begin.query()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3, hidden

    def warm(self, run: Run) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.synchronize()

    def capture(self, prepare: Callable[[], Any], call: Callable[[Any], object], calls: int) -> Run:
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor.detach())
            return tensor

        # A backward pass frees what its forward pass saved, and later replays read it again. It also runs on the CUDA
        # stream of the forward pass, so that must be the one that captures.
        with torch.cuda.stream(self.stream), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = [prepare() for _ in range(calls)]
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for state in states:
                call(state)

        def replay() -> object:
            graph.replay()
            return saved, states  # they live as long as the graph

        return replay
