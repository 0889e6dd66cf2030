"""Finished runs in a file of JSON lines, so that a command that is stopped continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stn_fast.errors import UserError
from stn_fast.values import to_json

Row = dict[str, Any]


class KeptRuns:
    """The rows of ``path``, one for each run; without a path, they are kept in memory.

    A last line without an end, which a stopped command left, is removed.

    Args:
        path: a file, which need not exist.
        key: names of the entries that tell runs apart.

    Raises:
        UserError: a line of the file is not a row of this command.
    """

    def __init__(self, path: Path | None, key: Sequence[str]) -> None:
        self._path, self._key = path, tuple(key)
        self._rows: dict[tuple[Any, ...], Row] = {}
        if path is None or not path.exists():
            return
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # the command was stopped while it wrote a row
            path.write_text(complete)
        try:
            for line in complete.splitlines():
                self._remember(json.loads(line))
        except ValueError as error:
            raise UserError(f"--out {path}: a line is not JSON ({error}); name another file or correct it") from None
        except (KeyError, TypeError):
            raise UserError(f"--out {path} holds other things than rows of this command: name another file") from None

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
