"""Standard output and error of the command lines: any encoding will do, and a reader may go away."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


def printable(text: str) -> str:
    """``text`` on one line: control characters, such as a newline or the start of a colour code, as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


class Output:
    """A text stream whose writer goes on when nothing can be written any more; ``failure`` then says why.

    Characters that the stream's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                return self.stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._fail(error)

    @property
    def reader_gone(self) -> bool:
        """Whether what failed is the other end of a pipe: `head` has seen enough. Windows says EINVAL."""
        return self.failure is not None and self.failure.errno in (errno.EPIPE, errno.EINVAL)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        # The interpreter flushes the stream once more at exit: what is left in it goes nowhere instead.
        with suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outputs() -> Iterator[tuple[Output, Output]]:
    """sys.stdout and sys.stderr as ``Output`` inside; one that is closed (None) leads nowhere."""
    with open(os.devnull, "w") as nowhere:
        output, error = Output(sys.stdout or nowhere), Output(sys.stderr or nowhere)
        with redirect_stdout(output), redirect_stderr(error):
            yield output, error
            output.flush()
            error.flush()
