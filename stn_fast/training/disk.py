"""Writing so that it lasts: contents and names are on the disk when a function here returns."""

from __future__ import annotations

import os
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


def write_through(path: Path, contents: bytes) -> None:
    """Writes the file and waits until its contents are on the disk."""
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Waits until the names in ``directory`` are on the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes ``path`` and its parents where they are missing, for good."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync(directory.parent)


def replace(path: Path, text: str) -> None:
    """Writes the file whole: a reader finds the old text or the new, whenever the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        write_through(partial, text.encode())
        partial.replace(path)
        sync(path.parent)
