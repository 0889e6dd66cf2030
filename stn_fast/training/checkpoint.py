"""Checkpoints: ``step-XXXXXXXX/`` directories that are either whole or absent, each with a checksum of its contents."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stn_fast import files
from stn_fast.errors import UserError
from stn_fast.files import make_directory, sync, write_through
from stn_fast.training.disk import writing
from stn_fast.values import from_json, to_json

STATE, MANIFEST = "state.pt", "manifest.json"
FORMAT = 4  # counts the layouts of the state; another one is not read
KEPT = 2  # the last so many stay, beside the best of each


_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced)")


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read back as it was written."""


def path_of(root: Path, step: int) -> Path:
    """The directory of the checkpoint taken after ``step`` steps."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps with a checkpoint under ``root``, ascending."""
    matches = (_NAME.fullmatch(entry.name) for entry in files.entries(root))
    return sorted(int(match[1]) for match in matches if match)


def foreign(root: Path) -> list[Path]:
    """What lies under ``root``, or in its place, that no checkpoint put there."""
    if files.exists(root) and not files.is_directory(root):
        return [root]
    ours = (_NAME, _LEFTOVER)
    return [entry for entry in files.entries(root) if not any(name.fullmatch(entry.name) for name in ours)]


def clear(root: Path) -> None:
    """Removes every checkpoint under ``root`` and what a kill left of others; foreign entries stay."""
    with writing(root):
        for entry in sorted({*files.entries(root)} - {*foreign(root)}):
            shutil.rmtree(entry)


def recover(root: Path) -> None:
    """Mends what a kill left in the middle of ``write``: a checkpoint about to be replaced is put back."""
    with writing(root):
        for entry in files.entries(root):
            match = _LEFTOVER.fullmatch(entry.name)
            if match and match[2] == "replaced" and not (root / match[1]).exists():
                entry.rename(root / match[1])
            elif match:
                shutil.rmtree(entry)


def write(root: Path, step: int, state: dict[str, Any], best_step: int) -> Path:
    """Writes ``state`` atomically and drops the checkpoints that are no longer needed.

    A reader sees the whole directory or none of it, whenever the process or the machine stops: contents are on the
    disk before the directory takes its name. (Only where ``step`` already has one is there a moment without; then
    ``recover`` puts the old one back.) Kept are this one, the one before, and the best of each.

    Raises:
        CannotWrite: the disk is full or refuses; the checkpoints from before are intact.
    """
    target = path_of(root, step)
    partial, replaced = (root / f".{target.name}.{part}" for part in ("partial", "replaced"))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = buffer.getvalue()
    manifest = {
        "format": FORMAT,
        "step": step,
        "best_step": best_step,
        "sha256": hashlib.sha256(contents).hexdigest(),
    }
    with writing(target):
        make_directory(root)
        recover(root)
        partial.mkdir()
        try:
            write_through(partial / STATE, contents)
            write_through(partial / MANIFEST, to_json(manifest).encode())
            sync(partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(root, step, best_step)
    return target


def read(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in the checkpoint directory ``path``, its tensors on ``device``.

    Raises:
        DamagedCheckpoint: a file is missing, or its contents are not those that were written.
        UserError: it is whole, but of another format.
    """
    try:
        manifest = from_json((path / MANIFEST).read_bytes())
        contents = (path / STATE).read_bytes()
        wanted, written_as = manifest["sha256"], manifest.get("format", 0)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}: {error.filename})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged") from None
    if hashlib.sha256(contents).hexdigest() != wanted:
        raise DamagedCheckpoint(f"{path / STATE} is damaged (its checksum differs from the manifest's)")
    if written_as != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {written_as}, this stn_fast reads format {FORMAT}: "
            "go on with the version that wrote it, or start over with --no-resume"
        )
    try:
        return torch.load(io.BytesIO(contents), map_location=device, weights_only=True)
    except Exception as error:  # torch.load documents none of the many kinds it raises
        raise DamagedCheckpoint(f"{path / STATE} cannot be loaded ({one_line(error)})") from error


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Turns what loading the state from ``path`` raises inside into an error that names the cure."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} does not fit this network or trainer ({one_line(error)}): "
            "go on with the code that wrote it, or start over with --no-resume"
        ) from error


def one_line(error: Exception) -> str:
    """What ``error`` says, short enough to stand inside a line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")


def read_newest(
    root: Path, device: torch.device | str, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole and its state, or None where there is no checkpoint.

    ``warn`` is called for each damaged one.

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
        return path_of(root, step), state
    if damage:
        raise UserError(
            f"every checkpoint under {root} is damaged, the last one: {damage}; "
            "restore one from a copy, or start over with --no-resume"
        )
    return None


def _best_step(path: Path) -> int | None:
    try:
        return int(from_json((path / MANIFEST).read_bytes())["best_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _prune(root: Path, step: int, best_step: int) -> None:
    """A checkpoint from beyond ``step`` is a damaged one that the run fell back from: it goes too."""
    last = [other for other in steps(root) if other <= step][-KEPT:]
    wanted = {best_step, *last, *(_best_step(path_of(root, other)) for other in last)}
    for other in steps(root):
        if other not in wanted:
            shutil.rmtree(path_of(root, other), ignore_errors=True)
