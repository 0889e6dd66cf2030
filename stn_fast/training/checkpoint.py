"""Checkpoints: ``step-XXXXXXXX/`` directories, written atomically, with checksums of every file.

The numbers of tensors are in ``tensors.safetensors`` and everything else is in ``state.json``, so that reading a
checkpoint runs no code. ``manifest.json`` has the SHA-256 of both, and of its own contents.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stn_fast import files
from stn_fast.errors import UserError
from stn_fast.files import make_directory, sync, write_through
from stn_fast.training import states
from stn_fast.training.disk import writing
from stn_fast.values import from_json, to_json

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 7  # version of the state's layout; other versions are not read

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced)")


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete or differs from what was written."""


def path_of(root: Path, step: int) -> Path:
    """The directory of the checkpoint taken after ``step`` steps."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps with a checkpoint under ``root``, ascending."""
    matches = (_NAME.fullmatch(entry.name) for entry in files.entries(root))
    return sorted(int(match[1]) for match in matches if match)


def foreign(root: Path) -> list[Path]:
    """Files under ``root``, or a file in its place, that do not belong to any checkpoint."""
    if files.exists(root) and not files.is_directory(root):
        return [root]
    ours = (_NAME, _LEFTOVER)
    return [entry for entry in files.entries(root) if not any(name.fullmatch(entry.name) for name in ours)]


def clear(root: Path) -> None:
    """Removes every checkpoint under ``root`` and remains of interrupted writes; foreign files stay."""
    with writing(root):
        for entry in sorted({*files.entries(root)} - {*foreign(root)}):
            shutil.rmtree(entry)


def recover(root: Path) -> None:
    """Cleans up after an interrupted ``write``; a checkpoint that was being replaced is restored."""
    restore(root)
    with writing(root):
        for entry in files.entries(root):
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)


def restore(root: Path) -> None:
    """Restores a checkpoint that an interrupted ``write`` was replacing; if there is none, nothing is written."""
    with writing(root):
        for entry in files.entries(root):
            match = _LEFTOVER.fullmatch(entry.name)
            if match and match[2] == "replaced" and not (root / match[1]).exists():
                entry.rename(root / match[1])


def write(root: Path, step: int, state: dict[str, Any], best_step: int, kept: int = 2) -> Path:
    """Writes ``state`` as ``write_encoded`` does.

    Raises:
        CannotWrite: as ``write_encoded``.
        UserError: the state holds an object that a checkpoint can't hold.
    """
    return write_encoded(root, step, best_step, kept, *states.encoded(state))


def write_encoded(root: Path, step: int, best_step: int, kept: int, text: bytes, tensors: dict[str, Tensor]) -> Path:
    """Writes a state that is encoded, atomically, and removes the checkpoints that are no longer needed.

    Whenever the process or the machine stops, the directory is complete or absent: its contents are on the disk before
    it gets its name. (Replacing an existing checkpoint of ``step`` leaves a moment without one; ``recover`` then
    restores the old one.) The last ``kept`` checkpoints, and the best one as of each, are kept.

    Raises:
        CannotWrite: the disk is full or cannot be written; earlier checkpoints are intact.
    """
    target = path_of(root, step)
    partial = partial_of(target)
    contents = {TENSORS: states.to_safetensors(tensors), STATE: [text]}
    sums = {name: _sha256(*parts) for name, parts in contents.items()}
    manifest = signed({"format": FORMAT, "step": step, "best_step": best_step, "files": sums})
    with writing(target):
        make_directory(root)
        recover(root)
        partial.mkdir()
        try:
            for name, parts in contents.items():
                write_through(partial / name, *parts)
            write_through(partial / MANIFEST, to_json(manifest).encode())
            sync(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        put_in_place(partial, target)
    prune(root, step, best_step, kept)
    return target


def partial_of(target: Path) -> Path:
    """Where the checkpoint ``target`` is until it is complete."""
    return target.with_name(f".{target.name}.partial")


def put_in_place(partial: Path, target: Path) -> None:
    """Gives a complete directory its name, in place of an older one."""
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in the checkpoint directory ``path``, its tensors on ``device``.

    Raises:
        DamagedCheckpoint: a file is missing, or its contents differ from what was written.
        UserError: the checkpoint is undamaged, but of another format.
    """
    advice = ": continue with the version that wrote it, or start over with --no-resume"
    sums = checked_manifest(path, FORMAT, "this stn_fast", advice)["files"]
    contents = {name: _read_bytes(path / name) for name in (TENSORS, STATE)}
    for name, content in contents.items():
        if _sha256(content) != sums.get(name):
            raise DamagedCheckpoint(f"{path / name} is damaged (its checksum differs from the manifest's)")
    try:
        tensors = states.from_safetensors(contents[TENSORS], device)
        return states.decoded(contents[STATE], tensors)
    except states.Unreadable as error:
        raise DamagedCheckpoint(f"{path} cannot be loaded ({one_line(error)})") from error


def checked_manifest(path: Path, wanted: int | str, reader: str, advice: str = "") -> dict[str, Any]:
    """The manifest, undamaged, of the format ``wanted`` and of the step that the directory is named for.

    Raises:
        DamagedCheckpoint: it is not.
        UserError: it is undamaged, but of another format, which ``reader`` does not read.
    """
    manifest = read_manifest(path)
    written_as, sums = manifest.get("format", 0), manifest.get("files")
    is_signed = manifest == signed(manifest)
    older = "sha256" in manifest and sums is None  # up to format 6, the checksum was that of the state
    if written_as != wanted and (is_signed or older):
        raise UserError(f"{path} is a checkpoint of format {written_as}, but {reader} reads format {wanted}{advice}")
    if not is_signed or not isinstance(sums, dict):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged (its checksum differs)")
    if (named := _NAME.fullmatch(path.name)) and manifest.get("step") != int(named[1]):
        raise DamagedCheckpoint(f"{path} is the checkpoint of step {manifest.get('step')}, under another name")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; raises DamagedCheckpoint if it is none."""
    contents = _read_bytes(path / MANIFEST)
    try:
        manifest = from_json(contents, strict=True)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged")
    return manifest


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path.parent} cannot be read ({error.strerror}: {error.filename})") from None


def _sha256(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the checksum of its other entries."""
    others = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**others, "sha256": _sha256(to_json(others).encode())}


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turns errors of loading the state from ``path`` into a UserError that says how to continue."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit this network or trainer ({one_line(error)}): "
            "continue with the code that wrote it, or start over with --no-resume"
        ) from error


def one_line(error: Exception) -> str:
    """The type and message of ``error``, shortened to fit in a line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def read_newest(
    root: Path, device: torch.device | str, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state, or None if there is no checkpoint.

    ``warn`` is called for each damaged one.

    Raises:
        UserError: there are checkpoints, but all are damaged.
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
        return path_of(root, step), state
    if damage:
        raise UserError(
            f"every checkpoint under {root} is damaged, the last one: {damage}; "
            "restore one from a copy, or start over with --no-resume"
        )
    return None


def _best_step(path: Path) -> int | None:
    try:
        return int(read_manifest(path)["best_step"])
    except (DamagedCheckpoint, ValueError, KeyError, TypeError, OverflowError):
        return None


def prune(root: Path, step: int, best_step: int | None, kept: int) -> None:
    """Removes all checkpoints but the last ``kept`` up to ``step``, and the best one as of each.

    Those after ``step`` are damaged: the run went back to an earlier one.
    """
    last = [other for other in steps(root) if other <= step][-kept:]
    wanted = {best_step, *last, *(_best_step(path_of(root, other)) for other in last)}
    for other in steps(root):
        if other not in wanted:
            shutil.rmtree(path_of(root, other), ignore_errors=True)
