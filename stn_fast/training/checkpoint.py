"""Checkpoints: ``step-XXXXXXXX/`` directories that are either whole or absent, each with a checksum of its contents."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stn_fast.errors import UserError

STATE, MANIFEST = "state.pt", "manifest.json"
KEPT = 2  # the last so many stay, beside the best of each


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read back as it was written."""


def path_of(root: Path, step: int) -> Path:
    """The directory of the checkpoint taken after ``step`` steps."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps with a checkpoint under ``root``, ascending."""
    if not root.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d{8,})", entry.name) for entry in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def write(root: Path, step: int, state: dict[str, Any], best_step: int) -> Path:
    """Writes ``state`` atomically and drops the checkpoints that are no longer needed.

    A reader sees the whole directory or none of it, whenever the process or the machine stops: contents are on the
    disk before the directory takes its name. Kept are this one, the one before, and the best of each.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = path_of(root, step)
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = buffer.getvalue()
    manifest = {"step": step, "best_step": best_step, "sha256": hashlib.sha256(contents).hexdigest()}
    _write_through(partial / STATE, contents)
    _write_through(partial / MANIFEST, json.dumps(manifest).encode())
    _sync(partial)
    replaced = root / f".{target.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(root, step, best_step)
    return target


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in the checkpoint directory ``path``, its tensors on ``device``.

    Raises:
        DamagedCheckpoint: a file is missing, or its contents are not those that were written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        contents = (path / STATE).read_bytes()
        wanted = manifest["sha256"]
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged") from None
    if hashlib.sha256(contents).hexdigest() != wanted:
        raise DamagedCheckpoint(f"{path / STATE} is damaged (its checksum differs from the manifest's)")
    return torch.load(io.BytesIO(contents), map_location=device, weights_only=True)


def read_newest(root: Path, device: torch.device | str, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest state that is whole, or None where there is no checkpoint. ``warn`` hears of each damaged one.

    Raises:
        UserError: there are checkpoints and every one is damaged.
    """
    found = steps(root)
    damage = ""
    for step in reversed(found):
        try:
            state = read(path_of(root, step), device)
        except DamagedCheckpoint as error:
            damage = str(error)
            if step != found[0]:
                warn(f"{error}; falling back to the checkpoint before it")
            continue
        return state
    if damage:
        raise UserError(
            f"every checkpoint under {root} is damaged, the last one: {damage}; "
            "restore one from a copy, or start over with --no-resume"
        )
    return None


def _best_step(path: Path) -> int | None:
    try:
        return int(json.loads((path / MANIFEST).read_text())["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prune(root: Path, step: int, best_step: int) -> None:
    """A checkpoint from beyond ``step`` is a damaged one that the run fell back from: it goes too."""
    last = [other for other in steps(root) if other <= step][-KEPT:]
    wanted = {best_step, *last, *(_best_step(path_of(root, other)) for other in last)}
    for other in steps(root):
        if other not in wanted:
            shutil.rmtree(path_of(root, other), ignore_errors=True)


def _write_through(path: Path, contents: bytes) -> None:
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
