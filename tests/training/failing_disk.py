"""A disk on which one call fails: making a directory, opening, writing or syncing a file, or renaming it."""

import errno
import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

ERRORS = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EACCES, errno.EIO)}
KINDS = ("mkdir", "open", "write", "fsync", "rename")


class _File:
    """A file whose writes are calls of the disk."""

    def __init__(self, disk, path, file):
        self._disk, self._path, self._file = disk, path, file

    def write(self, contents):
        self._disk.call("write", self._path)
        return self._file.write(contents)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


class FailingDisk:
    """Notes the calls below ``folder`` as (kind, path, number of such calls before), and fails at ``at``.

    Random parts of names are left out of the paths.
    """

    def __init__(self, folder, at=None, error=errno.ENOSPC):
        self.folder, self.at, self.error, self.failed = Path(folder), at, error, False
        self.calls, self._counts = [], Counter()

    def call(self, kind, path):
        if not Path(path).is_relative_to(self.folder):
            return
        name = re.sub(r"[0-9a-f]{32}", "", str(Path(path).relative_to(self.folder)))
        found = kind, name, self._counts[kind, name]
        self._counts[kind, name] += 1
        self.calls.append(found)
        if found == self.at:
            self.failed = True
            raise OSError(self.error, ERRORS[self.error], str(path))

    @contextmanager
    def patched(self):
        mkdir, opening, rename, replace, fsync = Path.mkdir, Path.open, Path.rename, Path.replace, os.fsync

        def note(kind, function):
            return lambda path, *given, **options: (self.call(kind, path), function(path, *given, **options))[1]

        def open_noted(path, mode="r", *given, **options):
            if "r" in mode:
                return opening(path, mode, *given, **options)
            self.call("open", path)
            return _File(self, path, opening(path, mode, *given, **options))

        def fsync_noted(descriptor):
            self.call("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "mkdir", note("mkdir", mkdir))
            patch.setattr(Path, "open", open_noted)
            patch.setattr(Path, "rename", note("rename", rename))
            patch.setattr(Path, "replace", note("rename", replace))
            patch.setattr(os, "fsync", fsync_noted)
            yield self
