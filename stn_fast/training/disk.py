"""What a run says when it can't write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotWrite(OSError):
    """The disk is full or refuses. Nothing that was whole before is lost."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` inside into a ``CannotWrite`` that names ``path`` and the cure."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(
            f"cannot write {path} ({error.strerror or error}); "
            "what was saved before is intact: mend that, and the same command goes on from there"
        ) from error
