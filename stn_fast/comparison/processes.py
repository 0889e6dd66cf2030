"""Functions called in processes of their own, several at a time, which a signal stops together."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from stn_fast.errors import UserError
from stn_fast.training.signals import Interrupted, StopRequest

SPAWN = multiprocessing.get_context("spawn")
POLL = 0.2  # seconds between two looks for a signal

Call = tuple[Callable[..., Any], tuple[Any, ...]]
# Yields calls and is sent their results.
Task = Generator[Call, Any, None]


class Stopped(Interrupted):
    """A signal stopped the calls, and so the runs that they made, each after a checkpoint."""

    def __init__(self, number: int) -> None:
        Exception.__init__(self, f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Processes:
    """At most ``jobs`` calls at a time, each in a new process, which the context manager ends.

    Ctrl-C and SIGTERM end all calls by SIGTERM, which lets a run write a checkpoint, and then raise `Stopped`. A second
    Ctrl-C doesn't wait for that.

    Raises:
        UserError: a call raised a UserError or an OSError.
        RuntimeError: a call raised another error, which its process has printed, or its process was killed.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._running: dict[Connection, tuple[Any, Any]] = {}
        self._stop = StopRequest()

    def __enter__(self) -> Processes:
        self._stop.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            for process, _ in self._running.values():
                process.terminate()
            for process, _ in self._running.values():
                process.join()
        finally:
            for process, _ in self._running.values():
                process.kill()
            self._stop.__exit__(kind, error, trace)

    def run(self, tasks: Iterable[Task]) -> None:
        """Runs ``tasks`` to their end. Each has one call at a time; tasks are begun in order, as processes get free."""
        waiting = iter(tasks)
        owners: dict[int, Task] = {}
        while True:
            while len(self._running) < self.jobs and (task := next(waiting, None)) is not None:
                self._go_on(owners, task, None)
            if not self._running:
                return
            number, result = self._next()
            self._go_on(owners, owners.pop(number), result)

    def _go_on(self, owners: dict[int, Task], task: Task, result: Any) -> None:
        try:
            call = task.send(result)
        except StopIteration:
            return
        number = id(task)
        owners[number] = task
        self._start(number, call)

    def map(self, function: Callable[[Any], Any], arguments: Sequence[Any]) -> Iterator[Any]:
        """The results of ``function`` in the order of ``arguments``."""
        finished: dict[int, Any] = {}
        started = 0
        for number in range(len(arguments)):
            while number not in finished:
                while started < len(arguments) and len(self._running) < self.jobs:
                    self._start(started, (function, (arguments[started],)))
                    started += 1
                other, result = self._next()
                finished[other] = result
            yield finished.pop(number)

    def _start(self, number: int, call: Call) -> None:
        ours, theirs = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_answer, args=(theirs, *call))
        with _blocked_signals():
            process.start()
        theirs.close()
        self._running[ours] = process, number

    def _next(self) -> tuple[Any, Any]:
        """(number, result) of the next call that ends."""
        while not (ready := wait(list(self._running), POLL)):
            self._check()
        self._check()
        (pipe, *_) = ready
        assert isinstance(pipe, Connection)
        try:
            problem, result = pipe.recv()
        except EOFError:
            problem, result = None, None
            process, _ = self._running[pipe]
            process.join()
            self._check()
            raise RuntimeError(f"a run's process ended with status {process.exitcode} and without a result") from None
        process, number = self._running.pop(pipe)
        process.join()
        if problem is not None:
            raise UserError(problem)
        return number, result

    def _check(self) -> None:
        if self._stop.number is not None:
            raise Stopped(self._stop.number)


@contextmanager
def mapped(function: Callable[[Any], Any], arguments: Sequence[Any], jobs: int) -> Iterator[Iterator[Any]]:
    """Yields the results of ``function`` in order: computed here, or by ``jobs`` processes at a time if several."""
    if jobs == 1:
        yield map(function, arguments)
        return
    with Processes(jobs) as processes:
        yield processes.map(function, arguments)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Inside, Ctrl-C is kept waiting: a process started then never gets it, and is ended by SIGTERM.

    A terminal sends Ctrl-C to all processes of a command.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the new process: sends (problem or None, result)."""
    try:
        answer: tuple[str | None, Any] = None, function(*arguments)
    except Interrupted as stop:
        sys.exit(stop.exit_status)
    except (UserError, OSError) as error:
        answer = str(error), None
    pipe.send(answer)
    pipe.close()
