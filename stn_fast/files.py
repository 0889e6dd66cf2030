"""Files and folders that users name: ``~`` is expanded, and one that can't be looked at is a UserError."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from stn_fast.errors import UserError


def expanded(path: str | Path, setting: str) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home directory; ``setting`` says where it was named.

    Raises:
        UserError: there is no such home directory, or the path has a null character.
    """
    if "\0" in str(path):
        raise UserError(f"{setting} {str(path)!r}: a path can't have a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"there is no home directory that {path} could be in; name another with {setting}") from None


def status(path: Path) -> os.stat_result | None:
    """What the system says of ``path``, symbolic links followed; None where nothing is there.

    Raises:
        UserError: it can't be looked at: no permission, or a name that is too long.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot look at {path} ({error.strerror})") from None


def exists(path: Path) -> bool:
    """Whether there is anything at ``path``; raises as ``status``."""
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
    """What is in ``directory``, sorted; nothing where there is none.

    Raises:
        UserError: it can't be looked at.
    """
    if not is_directory(directory):
        return []
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise UserError(f"cannot look into {directory} ({error.strerror})") from None


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
