"""The error of a run that can't write its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotWrite(OSError):
    """The disk is full or cannot be written. Files that were complete before are intact."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` inside into a ``CannotWrite`` that names ``path`` and says how to continue."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(
            f"cannot write {path} ({error.strerror or error}); "
            "everything saved before is intact: fix the problem, and the same command continues from there"
        ) from error
