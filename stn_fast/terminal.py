"""Standard output and error of the command lines: robust to any encoding and to readers that exit."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


def printable(text: str) -> str:
    """``text`` on one line, with control characters, such as newlines and colour codes, escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns padded to one width, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, lines)])


class Output:
    """A text stream that ignores all writes after one has failed; ``failure`` is then its error.

    Characters that the encoding lacks are written as escapes.
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
        """Whether the reader at the other end of a pipe has exited, as `head` does. On Windows this is EINVAL."""
        return self.failure is not None and self.failure.errno in (errno.EPIPE, errno.EINVAL)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        # The interpreter flushes the stream again at exit: send the rest to the null device instead.
        with suppress(OSError, ValueError):
            descriptor = self.stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def outputs() -> Iterator[tuple[Output, Output]]:
    """Inside, sys.stdout and sys.stderr are ``Output``; a closed one (None) writes to the null device."""
    with open(os.devnull, "w") as nowhere:
        output, error = Output(sys.stdout or nowhere), Output(sys.stderr or nowhere)
        with redirect_stdout(output), redirect_stderr(error):
            yield output, error
            output.flush()
            error.flush()
