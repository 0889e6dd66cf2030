"""Checkpoints of a `SelfTuner`, whole or sharded: ``step-XXXXXXXX/`` directories with checksums of every file.

Tensors are in safetensors files, which torch.distributed.checkpoint writes, each process its own shards. All else is in
``state.json``, so that reading a checkpoint runs no code. ``manifest.json`` has the SHA-256 of these files and of its
own contents; it is checked before anything else is read.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stn_fast import files
from stn_fast.errors import UserError
from stn_fast.extras import extra
from stn_fast.files import make_directory, sync, write_through
from stn_fast.training import states
from stn_fast.training.checkpoint import (
    MANIFEST,
    STATE,
    DamagedCheckpoint,
    checked_manifest,
    one_line,
    partial_of,
    path_of,
    prune,
    put_in_place,
    recover,
    restore,
    signed,
    steps,
)
from stn_fast.training.disk import CannotWrite, writing
from stn_fast.training.distributed import Processes, first_of, in_first
from stn_fast.values import to_json

FORMAT = "tuner-1"  # other formats are not read
Result = TypeVar("Result")

BLOCK = 1 << 20  # bytes that are hashed at a time


def write(root: Path, step: int, state: dict[str, Any], keep: int, processes: Processes | None) -> Path:
    """Writes a state atomically, and then removes all checkpoints but the last ``keep``; all processes must call it.

    Those after ``step`` are removed, too: they are damaged, or the run went back to an earlier one. Whenever a process
    or the machine stops, the directory is complete or absent, and earlier ones are intact.

    Raises:
        CannotWrite: the disk is full or cannot be written; earlier checkpoints are intact.
        UserError: the state holds an object that a checkpoint can't hold.
    """
    target = path_of(root, step)
    unfinished = partial_of(target)
    text, tensors = states.encoded(state)
    sums: dict[str, str] = {}

    def begin() -> None:
        with writing(target):
            make_directory(root)
            recover(root)
            unfinished.mkdir()

    def end() -> None:
        with writing(target):
            write_through(unfinished / STATE, text)
            every = {STATE: _sha256(unfinished / STATE), **sums}
            size = 1 if processes is None else processes.size
            manifest = signed({"format": FORMAT, "step": step, "processes": size, "files": every})
            write_through(unfinished / MANIFEST, to_json(manifest).encode())
            sync(unfinished)
            put_in_place(unfinished, target)
        prune(root, step, None, keep)

    in_first(processes, begin)
    try:
        with writing(target):
            _write_tensors(unfinished, tensors, processes)
        names = _everywhere(lambda: _names(unfinished), processes)[0]

        def own_sums() -> dict[str, str]:
            with writing(target):
                return _sums(unfinished, names, processes)

        for part in _everywhere(own_sums, processes):
            sums |= part
        in_first(processes, end)
    except Exception:
        if first_of(processes):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def read(
    root: Path, processes: Processes | None, like: Callable[[str], Tensor | None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state, or None if there is none; all processes must call it.

    Args:
        root: has the checkpoints; all processes see the same.
        processes: those that load it together. If others have written it, a warning says so.
        like: for the place of a tensor in the state, a sharded tensor whose shards it gets; None for a whole one.

    Raises:
        CannotWrite: the process that saved was killed while it replaced a checkpoint, which can't be restored.
        UserError: all are damaged, or the newest one is of another format.
    """
    in_first(processes, partial(restore, root))
    size, damage = 1 if processes is None else processes.size, ""
    for step in reversed(_everywhere(lambda: steps(root), processes)[0]):
        path = path_of(root, step)
        try:
            manifest = _everywhere(partial(_checked, path, processes), processes)[0]
            state = _state(path, processes, like)
        except DamagedCheckpoint as error:
            damage = str(error)
            warnings.warn(f"load: {damage}; trying the checkpoint before it", RuntimeWarning, stacklevel=3)
            continue
        if (saved_by := manifest.get("processes")) != size:
            warnings.warn(
                f"load: {path} was saved by {saved_by} and is loaded by {size} of the processes that "
                "share a batch, so the run goes on, but not bit for bit as it would have",
                RuntimeWarning,
                stacklevel=3,
            )
        return path, state
    if damage:
        raise UserError(f"every checkpoint under {root} is damaged, the first one: {damage}")
    return None


def _write_tensors(directory: Path, tensors: dict[str, Tensor], processes: Processes | None) -> None:
    """Writes safetensors files with the shards of all processes."""
    with extra("safetensors"):
        import safetensors  # noqa: F401
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _without_warning():
        try:
            save(tensors, storage_writer=writer, **_among(processes))
        except CheckpointException as error:  # in all processes, and not an Exception
            raise _cause(error) from error


def _checked(path: Path, processes: Processes | None) -> dict[str, Any]:
    """The manifest, if all files are there and as it says; every process checks some."""
    manifest = checked_manifest(path, FORMAT, "SelfTuner.load")
    sums = manifest["files"]
    if _names(path) != sorted([*sums, MANIFEST]):  # also the only names that are opened
        raise DamagedCheckpoint(f"{path} is damaged (its files are not those of its manifest)")
    try:
        own_sums = _sums(path, sorted(sums), processes)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error.strerror}: {error.filename})") from None
    for name, found in own_sums.items():
        if found != sums[name]:
            raise DamagedCheckpoint(f"{path / name} is damaged (its checksum differs from the manifest's)")
    return manifest


def _state(path: Path, processes: Processes | None, like: Callable[[str], Tensor | None]) -> dict[str, Any]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    reader, tensors, state = HuggingFaceStorageReader(str(path)), dict[str, Tensor](), dict[str, Any]()

    def make_room() -> None:
        with _loading(path):
            for name, stored in reader.read_metadata().state_dict_metadata.items():
                tensors[name] = _room(name, stored, like(name))

    def decode() -> None:
        with _loading(path):
            state.update(states.decoded((path / STATE).read_bytes(), tensors))

    _everywhere(make_room, processes)
    with _loading(path), _without_warning():
        try:
            load(tensors, storage_reader=reader, **_among(processes))
        except CheckpointException as error:  # in all processes, and not an Exception
            raise _cause(error) from error
    _everywhere(decode, processes)
    return state


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Turns errors of files that are those of their manifest, but not what `write` writes, into DamagedCheckpoint."""
    try:
        yield
    except Exception as error:
        raise DamagedCheckpoint(f"{path} cannot be loaded ({one_line(error)})") from error


@contextmanager
def _without_warning() -> Iterator[None]:
    """Without torch's warning that there are no other processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: Any) -> Exception:
    """The error of a process that torch.distributed.checkpoint has raised in all of them."""
    causes = [cause for cause, _ in error.failures.values()]
    found: Exception = next((one for one in causes if isinstance(one, OSError)), causes[0])
    return found


def _room(name: str, kept: Any, like: Tensor | None) -> Tensor:
    """An empty tensor for a stored one, with the shards of ``like`` if it has the same shape."""
    stored = sum(math.prod(chunk.sizes) for chunk in kept.chunks)
    if stored != math.prod(kept.size):  # a shape that is only declared could fill the memory
        raise states.Unreadable(f"{name} has {stored} numbers, but its shape is {tuple(kept.size)}")
    starts, sizes = (torch.tensor([[*getattr(one, key)] for one in kept.chunks]) for key in ("offsets", "sizes"))
    ends = starts + sizes
    common = torch.minimum(ends[:, None], ends) - torch.maximum(starts[:, None], starts)  # of each chunk and another
    overlap = (common > 0).all(-1).fill_diagonal_(False)
    if (starts < 0).any() or overlap.any():  # then some numbers are in no chunk: as many are stored as the shape has
        raise states.Unreadable(f"{name} has parts that overlap or are outside of its shape {tuple(kept.size)}")
    if like is not None and like.shape == kept.size:
        return torch.empty_like(like, dtype=kept.properties.dtype)
    return torch.empty(kept.size, dtype=kept.properties.dtype)


def _among(processes: Processes | None) -> dict[str, Any]:
    """Who saves or loads together, as arguments of torch.distributed.checkpoint."""
    return {"no_dist": True} if processes is None else {"process_group": processes.group}


def _everywhere(call: Callable[[], Result], processes: Processes | None) -> list[Result]:
    """What it returns in each process; an error in one of them is one in all."""
    if processes is None:
        return [call()]
    result, error = None, None
    try:
        result = call()
    except (UserError, OSError) as raised:
        kind = next((kind for kind in (DamagedCheckpoint, UserError, CannotWrite) if isinstance(raised, kind)), OSError)
        error = kind, str(raised)
    everything = processes.gathered((result, error))
    for kind, text in (found for _, found in everything if found is not None):
        raise kind(text)
    return [found for found, _ in everything]


def _names(directory: Path) -> list[str]:
    return [entry.name for entry in files.entries(directory)]


def _sums(directory: Path, names: list[str], processes: Processes | None) -> dict[str, str]:
    """The SHA-256 of those of the files that this process checks."""
    own = names if processes is None else names[processes.rank :: processes.size]
    return {name: _sha256(directory / name) for name in own}


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
