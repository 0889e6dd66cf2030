"""Finished runs in a file of JSON lines, so that a command that is stopped continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stn_fast.errors import UserError
from stn_fast.files import exists, read_text
from stn_fast.values import to_json

Row = dict[str, Any]


class KeptRuns:
    """The rows of ``path``, one for each run; without a path, they are kept in memory.

    A last line that is not complete, which a stopped command left, is removed.

    Args:
        path: a file, which need not exist.
        key: names of the entries that tell runs apart.

    Raises:
        UserError: the file can't be read, or a line is not a row of this command.
    """

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self._path, self._key = path, tuple(key)
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path is None or not exists(path):
            return
        found = read_text(path)
        text = _complete(found)
        try:
            for line in text.splitlines():
                self._remember(json.loads(line))
        except ValueError as error:
            raise UserError(f"--out {path}: a line is not JSON ({error}); name another or correct it") from None
        except (KeyError, TypeError):
            raise UserError(f"--out {path} holds other things than rows of this command: name another") from None
        if text != found:
            path.write_text(text)

    def _remember(self, row: Row) -> None:
        self._rows[tuple(row[name] for name in self._key)] = row

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def find(self, run: Mapping[str, Any]) -> Row | None:
        """The row of the run with these entries, which must contain the key; None if there is none."""
        return self._rows.get(tuple(run[name] for name in self._key))

    def add(self, row: Row) -> None:
        """Adds a row, to the file as well."""
        self._remember(row)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(to_json(row) + "\n")


def _complete(text: str) -> str:
    """``text`` with an end to its last line, or without that line if it is the beginning of a row."""
    *lines, last = text.split("\n")
    try:
        json.loads(last or "null")
    except ValueError:
        last = "" if last.startswith("{") else last
    return "\n".join([*lines, last, ""] if last else [*lines, ""])
