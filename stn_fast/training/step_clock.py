"""How long the steps of a run take, without evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable


class StepClock:
    """Adds up ``seconds`` on the clock and ``cpu_seconds`` (of all threads) between each ``resume`` and ``pause``.

    A device must be waited for before ``pause``, or its unfinished work is not in ``seconds``. ``beside`` returns the
    CPU seconds so far of threads that do something else.
    """

    def __init__(self, beside: Callable[[], float] = lambda: 0.0) -> None:
        self._beside = beside
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._since: tuple[float, float] | None = None

    def resume(self) -> None:
        """Starts to count, from 0 or from where it was paused."""
        self._since = time.perf_counter(), self._cpu_seconds()

    def pause(self) -> None:
        """Stops counting; does nothing if it is paused already."""
        if self._since is None:
            return
        began, cpu_began = self._since
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += self._cpu_seconds() - cpu_began
        self._since = None

    def _cpu_seconds(self) -> float:
        return time.process_time() - self._beside()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
