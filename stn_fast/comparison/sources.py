"""Which code of the package made a row."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import stn_fast
from stn_fast.comparison.kept_runs import Row


def sources_digest(package: Path | None = None, extension: Path | None = None) -> str:
    """A hash of the names and contents of all Python files of the package and of its C++ extension.

    ``package`` is the folder, by default that of stn_fast, and ``extension`` the file, by default that of stn_fast._C
    if it was built. Compilation flags, other packages and the code of a recipe of your own are not covered.
    """
    package = package or Path(stn_fast.__path__[0])
    if extension is None and (spec := find_spec("stn_fast._C")) is not None and spec.origin is not None:
        extension = Path(spec.origin)
    digest = hashlib.sha256()
    named = [(path.relative_to(package).as_posix(), path) for path in _python_files(package)]
    for name, path in [*sorted(named), *([("_C", extension)] if extension else [])]:
        contents = path.read_bytes()
        digest.update(f"{name} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()[:12]


def _python_files(folder: Path) -> Iterator[Path]:
    """All ``.py`` files; a clone's ``kernels`` is a link to another folder, which is followed."""
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def of_other_sources(rows: Sequence[Row], digest: str) -> str | None:
    """A line that counts the rows which other sources than those of ``digest`` made; None if there are none."""
    others = sum(row["sources"] != digest for row in rows)
    return f"{others} of {len(rows)} rows were made by other sources of the package." if others else None
