"""Ctrl-C, SIGTERM and SIGUSR1 stop the loop after the current step; a second Ctrl-C stops it immediately.

Schedulers of clusters send one of the last two some time before they take a machine away.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(Exception):
    """A signal stopped the run after a checkpoint was written; the exit status is 130 for Ctrl-C, else 143."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}, with a checkpoint")
        self.exit_status = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


class StopRequest:
    """While entered, the first signal is noted in ``number`` instead of ending the process."""

    number: int | None = None

    def __enter__(self) -> StopRequest:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._before = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
            # Not print, which the handler may have interrupted. Errors of a closed terminal don't matter.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), b"\nstopping after this step or evaluation; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._in_main_thread:
            for number, handler in zip(SIGNALS, self._before, strict=True):
                signal.signal(number, handler)
