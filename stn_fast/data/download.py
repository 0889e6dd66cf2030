"""Published files: downloaded if they are missing, and always checked against their checksum before use."""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from stn_fast import files
from stn_fast.errors import UserError
from stn_fast.terminal import printable

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class Published:
    """A published file: its name, its size in bytes, its SHA-256, and its addresses."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...] = ()


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds a folder for every data set: ``root``, else STN_FAST_DATA, else ~/.cache/stn_fast/data.

    Raises:
        UserError: there is no home directory, but one is needed.
    """
    path = root or os.environ.get("STN_FAST_DATA") or "~/.cache/stn_fast/data"
    return files.expanded(path, "--data-root or STN_FAST_DATA")


def verified(path: Path, published: Published) -> bytes:
    """The contents of ``path``, after checking their size and checksum.

    Raises:
        UserError: the file cannot be read, is cut short or has been changed.
    """
    contents = files.read_bytes(path)
    if (damage := _damage(len(contents), hashlib.sha256(contents), published)) is not None:
        raise UserError(f"{path} {damage}; delete it, and the next run downloads it again")
    return contents


def fetch(folder: Path, published: Published) -> bytes:
    """The contents of ``published`` in ``folder``, which is downloaded if it is missing.

    Raises:
        UserError: as ``verified``; or the file is missing and cannot be downloaded.
    """
    path = folder / published.name
    if not files.exists(path):
        with downloaded(path, published) as partial:
            partial.replace(path)
    return verified(path, published)


@contextmanager
def downloaded(path: Path, published: Published) -> Iterator[Path]:
    """A checked file with the published contents: ``path`` if it exists, else a download beside it.

    A downloaded file is removed at the end, unless it was renamed.

    Raises:
        UserError: as ``verified``; or the file cannot be downloaded. The message says why, and where to put it by hand.
    """
    if files.exists(path):
        verified(path, published)
        yield path
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with files.beside(path) as partial:
        _download(path, partial, published)
        yield partial


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` inside into a ``UserError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} is missing and cannot be written ({error.strerror}); name another folder with --data-root"
        ) from None


class _NoAnswer(Exception):
    """A download failed or was interrupted."""


def _download(path: Path, partial: Path, published: Published) -> None:
    failures = []
    for url in published.urls:
        says = f"downloading {url} ({published.size / 1e6:.1f} MB) to {path.parent}"
        print(printable(says), file=sys.stderr, flush=True)
        try:
            with writing(path):
                damage = _copy(url, partial, published)
        except _NoAnswer as error:
            damage = f"gives no file ({error})"
        if damage is None:
            return
        failures.append(f"{url} {damage}")
    raise UserError(
        f"{path} is missing, and {'; '.join(failures)}: put the file there by hand, "
        f"or name the folder that has {path.parent.name}/{path.name} with --data-root or STN_FAST_DATA"
    )


def _copy(url: str, partial: Path, published: Published) -> str | None:
    """Downloads ``url`` to ``partial``; returns what is wrong with the file, None if it is the published one."""
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for chunk in _chunks(url):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if size > published.size:
                break
        file.flush()
        os.fsync(file.fileno())
    return _damage(size, digest, published)


def _chunks(url: str) -> Iterator[bytes]:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "stn_fast"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            while chunk := answer.read(CHUNK):
                yield chunk
    except (OSError, HTTPException) as error:
        raise _NoAnswer(" ".join(str(error).split()) or type(error).__name__) from None


def _damage(size: int, digest: hashlib._Hash, published: Published) -> str | None:
    """How contents of ``size`` bytes differ from the published ones, as the end of a sentence; None if they don't."""
    if size < published.size:
        return f"is cut short ({size:,} of {published.size:,} bytes)"
    if size > published.size or digest.hexdigest() != published.sha256:
        return "is not the published file (its SHA-256 differs)"
    return None
