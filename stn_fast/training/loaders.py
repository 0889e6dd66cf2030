"""Loaders, such as a DataLoader, read in an order that a resumed run repeats.

A loader's order and the random numbers of its data set come from torch's generators. Each pass uses them at states
that are a function of (seed, stream, number of the pass), so a pass can be read again up to any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from stn_fast.errors import UserError
from stn_fast.training.batches import Batch
from stn_fast.training.generators import OwnStates, default_generators

# Streams of random numbers; 0 and 1 are those of training and validation steps.
EVALUATE_VALID, EVALUATE_TEST, COUNT, STEPS = 2, 3, 4, 5

_END = object()


class Loaded:
    """A loader and how its entries become batches: a part of the data of a task, in place of a `Split`.

    Args:
        name: what errors call it.
        loader: an iterable of entries that can be read again and again. If it has no ``len()``, its batches are counted
            by reading it once.
        as_batch: makes the batch of an entry.
        device: that of the model.

    Attributes:
        batches: number of batches in each pass.
        examples: number of examples that the last evaluation has read.

    Raises:
        TypeError: it is not iterable.
        UserError: it can be read only once, or gives no batch.
    """

    def __init__(self, name: str, loader: Any, as_batch: Callable[[Any], Batch], device: torch.device) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"{name} must be a loader, an iterable of batches such as a DataLoader, got {type(loader).__name__}"
            )
        if isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools"):
            raise UserError(
                f"{name} can be read only once, as it is a {type(loader).__name__}: give one that can be read again "
                "and again, such as a DataLoader or a list of batches"
            )
        self.name, self.as_batch, self.examples = name, as_batch, 0
        self.loader: Any = _without_memory(loader)
        self.generators = _generators(loader, device)
        self.batches = self._count()
        if self.batches == 0:
            raise UserError(
                f"{name} gives no batch: its data set is empty, or smaller than a batch with drop_last=True"
            )

    def _count(self) -> int:
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            reading = Pass(self, 0, COUNT, 0)
            return sum(1 for _ in iter(reading.entry, _END))

    @property
    def batch_size(self) -> int:
        """That of the loader, if it has one; else the number of examples in its first batch."""
        size = getattr(self.loader, "batch_size", None)
        return size if isinstance(size, int) and size >= 1 else Pass(self, 0, COUNT, 0).batch().examples

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The examples, if the data set holds them in tensors: a TensorDataset, or a Subset of one."""
        data: Any = getattr(self.loader, "dataset", None)
        rows = None
        if type(data) is Subset:
            data, rows = data.dataset, torch.as_tensor(data.indices)
        if type(data) is not TensorDataset:
            return ()
        return data.tensors if rows is None else tuple(tensor[rows.to(tensor.device)] for tensor in data.tensors)


def _without_memory(loader: Any) -> Any:
    """The loader, or one like it whose workers are started anew in each pass, because persistent ones keep a state."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        loader = copy(loader)
        loader.__dict__["persistent_workers"] = False  # a DataLoader refuses to set it
    return loader


def _generators(loader: Any, device: torch.device) -> list[torch.Generator]:
    """The generators that reading a loader draws from: torch's own, and those given to a DataLoader or its samplers."""
    found = default_generators(device)
    if isinstance(loader, DataLoader):
        samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        given = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
        found += dict.fromkeys(one for one in given if isinstance(one, torch.Generator) and one not in found)
    return found


# The pass that an iterator is in. A loader may return the same iterator, itself, for each pass; the pass before is then
# lost.
_in_use: WeakValueDictionary[int, Pass] = WeakValueDictionary()


class Pass:
    """Pass number ``number`` over a loader, in which torch's generators have states of their own."""

    def __init__(self, loaded: Loaded, seed: int, stream: int, number: int) -> None:
        self.loaded, self.number, self.position, self.lost = loaded, number, 0, False
        self._states = OwnStates(loaded.generators, (seed, stream, number))
        with self._states:
            self._iterator = iter(loaded.loader)
        if (other := _in_use.get(id(self._iterator))) is not None:
            other.lost = True
        _in_use[id(self._iterator)] = self

    def entry(self) -> Any:
        """The next entry of the loader, or ``_END``."""
        with self._states:
            entry = next(self._iterator, _END)
        self.position += entry is not _END
        return entry

    def batch(self) -> Batch:
        """The next batch; the last one of the pass also checks that it is the last.

        Raises:
            UserError: the pass has fewer or more batches than the loader is known to give.
        """
        entry = self.skip()
        if self.position == self.loaded.batches and self.entry() is not _END:
            raise self._wrong_number(f"more than {self.loaded.batches}")
        return self.loaded.as_batch(entry)

    def skip(self) -> Any:
        """The next entry; errors as of ``batch``."""
        entry = self.entry()
        if entry is _END:
            raise self._wrong_number(f"only {self.position}")
        return entry

    def _wrong_number(self, found: str) -> UserError:
        name, batches = self.loaded.name, self.loaded.batches
        return UserError(
            f"{name} gave {found} batches in pass {self.number + 1}, but every pass must have {batches}, "
            "which is its len(), or the number in a first pass: it must be one that can be read again and again"
        )


class LoaderBatches:
    """The endless sequence of the batches of a loader, pass after pass; a `BatchSequence`.

    Reading another batch than the next one begins its pass again and skips the batches before it.
    """

    def __init__(self, loaded: Loaded, batch_size: int, seed: int, stream: int) -> None:
        self.examples, self.per_pass = batch_size, loaded.batches
        self._loaded, self._seed, self._stream = loaded, seed, stream
        self._pass: Pass | None = None
        self._read = 0

    def __getitem__(self, index: int) -> Batch:
        number, position = divmod(index, self.per_pass)
        now = self._pass
        if now is None or now.lost or (now.number, now.position) != (number, position):
            now = self._pass = Pass(self._loaded, self._seed, self._stream, number)
            for _ in range(position):
                now.skip()
        batch = now.batch()
        if now.position == self.per_pass:
            self._pass = None
        self._read += batch.examples
        return batch

    def examples_of(self, steps: int) -> int:
        """The number of examples in the batches read so far."""
        return self._read

    def state_dict(self) -> dict[str, Any]:
        return {"read": self._read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._read = state["read"]


class LoaderBatching:
    """Batches of loaders; a `Batching`. Batch sizes are those of the loaders.

    Every evaluation uses the same random numbers.
    """

    unit = "batches"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sequence(
        self, split: Loaded, batch_size: int, *, seed: int, stream: int, device: torch.device | None = None
    ) -> LoaderBatches:
        return LoaderBatches(split, batch_size, seed, stream)

    def whole(self, split: Loaded, size: int, *, test: bool, device: torch.device | None = None) -> Iterator[Batch]:
        reading = Pass(split, self.seed, EVALUATE_TEST if test else EVALUATE_VALID, 0)
        examples = 0
        for _ in range(split.batches):
            batch = reading.batch()
            examples += batch.examples
            yield batch
        split.examples = examples

    def misfit(self, split: Loaded, batch_size: int) -> str | None:
        return None

    def count(self, split: Loaded) -> int:
        return split.batches
