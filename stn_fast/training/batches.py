"""Shuffled batches whose order is a function of (seed, pass), and conversion of other data to batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.data import Split
from stn_fast.training.staging import Staging


@runtime_checkable
class Batch(Protocol):
    """What steps and evaluations need of a batch, besides the inputs and targets that objectives read.

    A batch may start from the state at the end of the previous one, as the windows of a text do. Steps and evaluations
    pass everything that an objective returns to ``finish``, which keeps such a state.
    """

    @property
    def examples(self) -> int:
        """B, the number of examples; each has its own draw of the hyperparameters."""

    def finish(self, outcome: Any) -> Any:
        """The loss or scores that an objective returned; a state returned with them is kept for the next batch.

        Raises:
            TypeError: there is a state, and this kind of batch doesn't keep one.
        """

    def undo(self, where: Tensor | None) -> None:
        """Clears what ``finish`` kept, because the step is skipped: always, or if the bool tensor ``where`` is true."""

    @property
    def begins(self) -> bool:
        """Whether it has no state to start from, so that a CUDA graph of the later batches does not fit it."""

    def parts(self) -> Any:
        """Everything in the batch that a step reads, as a pytree of tensors."""

    def like(self, parts: Any) -> Batch:
        """A separate batch with these parts, for a CUDA graph or for another step on the same batch."""

    def finish_as(self, other: Any) -> None:
        """Keeps for the next batch a copy of the state that ``other``, a batch made by ``like``, has kept."""


class Examples(Split):
    """A batch of independent examples: nothing is kept for the next one."""

    begins = False

    def finish(self, outcome: Any) -> Any:
        if isinstance(outcome, tuple):
            raise TypeError(
                "the loss must be a tensor, got a tuple: only a Window of Streams takes (loss, state), whose state it "
                "carries to the next batch"
            )
        return outcome

    def undo(self, where: Tensor | None) -> None:
        pass

    def parts(self) -> Any:
        return self.inputs, self.targets

    def like(self, parts: Any) -> Examples:
        return Examples(*parts)

    def finish_as(self, other: Any) -> None:
        pass

    def part(self, examples: slice) -> Examples:
        """Some of the examples, for one of several processes."""
        return Examples(*pytree.tree_map_only(Tensor, lambda tensor: tensor[examples], tuple(self)))

    def split(self, slices: Sequence[slice]) -> list[Examples]:
        """Parts of the batch, for a step that computes their gradients one after the other."""
        return [self.part(examples) for examples in slices]

    def join(self, parts: Sequence[Any]) -> None:
        pass


def shares(examples: int, count: int) -> list[slice]:
    """``examples`` divided into ``count`` parts in order, whose sizes differ by one at most."""
    return [slice(examples * k // count, examples * (k + 1) // count) for k in range(count)]


class BatchSequence(Protocol):
    """An endless sequence of batches of ``examples`` each; a position in it is an index and ``state_dict``.

    The last batch of each of its passes, of ``per_pass`` batches, may be smaller.
    """

    examples: int
    per_pass: int

    def __getitem__(self, index: int) -> Any: ...

    def examples_of(self, steps: int) -> int:
        """The number of examples in the first ``steps`` batches, which have been read."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batching(Protocol):
    """How a split, or another part of a task's data, is divided into batches."""

    @property
    def unit(self) -> str:
        """What examples are called, in the plural."""

    def sequence(
        self, split: Any, batch_size: int, *, seed: int, stream: int, device: torch.device | None = None
    ) -> BatchSequence:
        """The batches for training and validation steps."""

    def whole(self, split: Any, size: int, *, test: bool, device: torch.device | None = None) -> Iterable[Any]:
        """The batches of an evaluation: every example once, about ``size`` at a time."""

    def misfit(self, split: Any, batch_size: int) -> str | None:
        """What is wrong with a batch size; None if it is fine."""

    def count(self, split: Any) -> int:
        """The size of a split, in ``unit``."""


class IndependentExamples:
    """Independent examples: shuffled ``Batches`` for steps, each split in its own order for evaluations."""

    unit = "examples"

    def sequence(
        self, split: Split, batch_size: int, *, seed: int, stream: int, device: torch.device | None = None
    ) -> Batches:
        return Batches(split, batch_size, seed=seed, stream=stream, device=device)

    def whole(
        self, split: Split, size: int, *, test: bool, device: torch.device | str | None = None
    ) -> Iterator[Split]:
        for inputs, targets in zip(split.inputs.split(size), split.targets.split(size), strict=True):
            yield Split(inputs.to(device), targets.to(device))

    def misfit(self, split: Split, batch_size: int) -> str | None:
        return None if batch_size <= split.examples else f"must be at most {split.examples}, the number of examples"

    def count(self, split: Split) -> int:
        return split.examples


class Batches:
    """An endless sequence of shuffled batches of ``split``; every pass has its own order.

    Each batch holds exactly ``batch_size`` examples; each pass drops the remaining examples of its order. ``stream``
    gives splits with the same seed different orders. A split in host memory is copied to a CUDA ``device`` through
    pinned memory, one batch ahead; without ``device``, batches stay on the device of the split.
    """

    def __init__(
        self, split: Split, batch_size: int, *, seed: int, stream: int, device: torch.device | None = None
    ) -> None:
        if not 1 <= batch_size <= len(split.inputs):
            raise ValueError(
                f"batch_size must be from 1 to {len(split.inputs)}, the number of examples, got {batch_size}"
            )
        self.split, self.batch_size, self.seed, self.stream = split, batch_size, seed, stream
        self.examples = batch_size
        self.per_pass = len(split.inputs) // batch_size
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)
        crosses = device is not None and device.type == "cuda" and not split.inputs.is_cuda
        self._staging = Staging(split, batch_size, device) if device is not None and crosses else None
        self._sent: tuple[int, Split] | None = None

    def __getitem__(self, index: int) -> Split:
        """Batch number ``index`` of the sequence, which starts at 0 and has no end."""
        if self._staging is None:
            chosen = self._chosen(index)
            return Split(*(part.index_select(0, chosen) for part in self.split))
        if self._sent is None or self._sent[0] != index:
            self._sent = index, self._staging.send(self._chosen(index))
        batch = self._staging.receive(self._sent[1])
        self._sent = index + 1, self._staging.send(self._chosen(index + 1))
        return batch

    def examples_of(self, steps: int) -> int:
        return steps * self.examples

    def state_dict(self) -> dict[str, Any]:
        """Empty: the index of a batch fixes it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""

    def _chosen(self, index: int) -> Tensor:
        number, position = divmod(index, self.per_pass)
        if number != self._pass:
            self._pass, self._order = number, self._shuffled(number)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def _shuffled(self, number: int) -> Tensor:
        order = np.random.default_rng([self.seed, self.stream, number]).permutation(len(self.split.inputs))
        return torch.from_numpy(order).to(self.split.inputs.device)


def as_batch(batch: Any, device: torch.device) -> Batch:
    """Converts a batch, for example from a DataLoader, to a `Batch`; NumPy arrays become tensors on ``device``.

    - A `Batch`, such as a ``Window`` of a text, is returned unchanged.
    - A tuple or list is (inputs, targets); if it has three or more entries, the last is the targets, and the inputs are
      a tuple of the others.
    - A dict or named tuple must have ``targets``. If ``inputs`` is its only other key, that is the inputs; otherwise
      the inputs are a dict of all other entries.

    Inputs and targets may themselves be tuples, lists and dicts of tensors; dimension 0 of the first target tensor
    counts the examples.

    Raises:
        TypeError: ``batch`` is something else, or the targets are not tensors with at least one dimension.
    """
    if isinstance(batch, Examples):
        return batch
    if isinstance(batch, Split) and isinstance(batch.inputs, Tensor) and isinstance(batch.targets, Tensor):
        return Examples(*batch)
    if isinstance(batch, Batch):
        return batch
    if "targets" in getattr(batch, "_fields", ()):
        batch = batch._asdict()
    if isinstance(batch, Mapping) and "targets" in batch and len(batch) > 1:
        rest = {key: value for key, value in batch.items() if key != "targets"}
        inputs, targets = rest["inputs"] if rest.keys() == {"inputs"} else rest, batch["targets"]
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        *first, targets = batch
        inputs = first[0] if len(first) == 1 else tuple(first)
    else:
        kind = type(batch).__name__
        got = f"a dict with the keys {', '.join(map(str, batch)) or '(none)'}" if isinstance(batch, Mapping) else kind
        raise TypeError(
            "a batch must be (inputs, targets), (input, ..., targets), or a dict with 'targets' and the inputs; "
            f"got {got}"
        )
    examples = Examples(
        *pytree.tree_map_only(np.ndarray, lambda array: torch.tensor(array, device=device), (inputs, targets))
    )
    counted = next(iter(pytree.tree_leaves(examples.targets)), None)
    if not isinstance(counted, Tensor) or counted.ndim == 0:
        shown = "a tensor without dimensions" if isinstance(counted, Tensor) else type(counted).__name__
        raise TypeError(
            f"the targets of a batch must be tensors whose first dimension counts the examples, got {shown}"
        )
    return examples
