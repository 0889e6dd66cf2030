"""Files and folders: paths given by users, locks, and atomic writes.

``~`` is expanded in paths given by users, and a path that can't be accessed is a UserError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from stn_fast.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


def expanded(path: str | Path, setting: str) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by the home directory; errors name ``setting``.

    Raises:
        UserError: there is no such home directory, or the path contains a null character.
    """
    if "\0" in str(path):
        raise UserError(f"{setting} {str(path)!r}: a path can't have a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"there is no home directory for {path}; choose another path with {setting}") from None


def status(path: Path) -> os.stat_result | None:
    """The status of ``path``, following symbolic links; None if it does not exist.

    Raises:
        UserError: the path can't be accessed: no permission, or the name is too long.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot access {path} ({error.strerror})") from None


def exists(path: Path) -> bool:
    """Whether ``path`` exists; raises as ``status``."""
    return status(path) is not None


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file; raises as ``status``."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory; raises as ``status``."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def entries(directory: Path) -> list[Path]:
    """The sorted entries of ``directory``; an empty list if it does not exist.

    Raises:
        UserError: the directory can't be read.
    """
    if not is_directory(directory):
        return []
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise UserError(f"cannot list {directory} ({error.strerror})") from None


def read_bytes(path: Path) -> bytes:
    """The contents of ``path``.

    Raises:
        UserError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


def read_text(path: Path) -> str:
    """The text in the UTF-8 file ``path``.

    Raises:
        UserError: it can't be read, or is not UTF-8.
    """
    contents = read_bytes(path)
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = contents[error.start]
        raise UserError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {error.start:,} cannot be decoded") from None


def cache_root() -> Path:
    """The cache folder: STN_FAST_CACHE, else ~/.cache/stn_fast.

    Raises:
        UserError: there is no home directory, but one is needed.
    """
    return expanded(os.environ.get("STN_FAST_CACHE") or "~/.cache/stn_fast", "STN_FAST_CACHE")


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Inside, this process holds an exclusive lock on ``path``, if the system and the disk support locks.

    Raises:
        Locked: another process holds the lock, and ``wait`` is False.
        OSError: the file can't be created.
    """
    if fcntl is None:
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(str(path)) from None
        except OSError:  # a disk without locks
            pass
        yield


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, to be renamed to it; removed at the end if it still exists.

    Its name is globally unique, because process ids are not unique on a disk shared by several machines.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def replace(path: Path, contents: bytes) -> None:
    """Writes the file atomically: whenever the machine stops, it has either the old contents or the new ones.

    Raises:
        OSError: the file can't be written; the old contents are intact.
    """
    with beside(path) as partial:
        write_through(partial, contents)
        partial.replace(path)
    sync(path.parent)


def write_through(path: Path, *parts: Any) -> None:
    """Writes the file, whose contents are the parts, and waits until they are on the disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Waits until the entries of ``directory`` are on the disk; not needed on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Creates ``path`` and its missing parents, and waits until they are on the disk."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for directory in missing:
        sync(directory.parent)
