"""Checkpoints written by a thread, from a copy of the state, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from stn_fast.training import states

FAILED = 1 << 16  # in the place of a signal's number, says that a checkpoint could not be written


class Saving:
    """Writes one checkpoint at a time. Leaving the context waits for the last one.

    Args:
        warn: called with the error of a write if the context is left by another error.
    """

    def __init__(self, warn: Callable[[str], None] = lambda text: None) -> None:
        self.warn = warn
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._copies: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # for the two below
        self._clock: int | None = None  # of the CPU time of the thread that is running
        self._cpu_seconds = 0.0  # of those that have ended

    def begin(self, state: Any, write: Callable[[bytes, dict[str, Tensor]], object]) -> None:
        """Copies ``state``, and calls ``write`` with what `states.encoded` returns for it, in a thread.

        Raises:
            UserError: a checkpoint can't hold the state.
            Exception: what the write before this one has raised.
        """
        self.wait()
        text, tensors = states.encoded(state)
        self._copies = states.copied(tensors, self._copies)
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, args=(partial(write, text, self._copies),), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], object]) -> None:
        if hasattr(time, "pthread_getcpuclockid"):  # Linux
            with self._lock:
                self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            write()
        except BaseException as error:
            self._error = error
        with self._lock:
            self._clock = None
            self._cpu_seconds += time.thread_time()
        self._ended.set()

    @property
    def running(self) -> bool:
        """Whether a write is running."""
        return self._thread is not None and not self._ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether a write has raised an error, which ``wait`` will raise."""
        return self._error is not None

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the writes so far; of the one that is running, only on Linux."""
        with self._lock:
            return self._cpu_seconds + (0.0 if self._clock is None else time.clock_gettime(self._clock))

    def settle(self) -> None:
        """Returns once no write is running, whether or not it has failed."""
        if self._thread is not None and self._thread.is_alive():
            self._ended.wait()  # Ctrl-C in join would make Python 3.11 forget the thread
            self._thread.join()
        self._thread = None

    def wait(self) -> None:
        """Returns once the checkpoint is on the disk, and raises the error if it could not be written."""
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.settle()
        self._copies = {}
        if kind is None:
            self.wait()
        elif self._error is not None:
            self.warn(str(self._error))
            self._error = None
