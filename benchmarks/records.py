"""Reads the files written by benchmarks, including damaged ones as far as possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Of a row, whatever else it has.
NEEDED = ("op", "mode", "shape", "provider", "device")


def read_rows(directory: Path) -> tuple[list[Row], list[str]]:
    """The rows of all JSON files below ``directory``, oldest files first, and the files that could not be read.

    A damaged file gives the rows on its complete lines. JSON without rows is ignored.
    """
    rows: list[Row] = []
    problems: list[str] = []
    if not directory.is_dir():
        return rows, [f"{directory}: no such folder"]
    found = []
    for path in directory.rglob("*.json"):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    for _, path in sorted(found):
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        own, whole = rows_in(text)
        rows += own
        if not whole:
            problems.append(f"{path}: damaged or half written; {len(own)} rows could be read")
    return rows, problems


def rows_in(text: str) -> tuple[list[Row], bool]:
    """The rows of a file, and whether the whole file could be read."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content, whole = [value for line in text.splitlines() if (value := _row_on(line)) is not None], False
    else:
        whole = True
    return [value for value in content if _is_row(value)] if isinstance(content, list) else [], whole


def _row_on(line: str) -> Any:
    try:
        return json.loads(line.strip().rstrip(","))
    except (ValueError, RecursionError):
        return None


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(key in value for key in NEEDED)
        and isinstance(value["shape"], list)
        and all(isinstance(value[key], str) for key in NEEDED if key != "shape")
    )


def on_cuda(row: Row) -> bool:
    """Whether a row was measured on a GPU: only then is the host's time measured separately."""
    return row.get("host_us") is not None


def read_machine(path: Path) -> dict[str, Any]:
    """The results of `benchmarks.preflight`; empty if they can't be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
