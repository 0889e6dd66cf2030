"""A text cut into columns that are read in parallel, window by window, and the state carried between windows.

    streams = Streams(split, 40, 70, seed=0, stream=0)
    for step in range(steps):
        loss = method.train_step(streams[step], step)

The objective reads ``window.state`` and returns (loss, new state); the new state, detached, becomes the state of the
next window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.data import Split

# The model's state: a tensor, or tuples, lists and dictionaries of tensors.
State = Any

IGNORED = -100  # a target without a loss, as for torch.nn.functional.cross_entropy


class _Carrier:
    """Holds the state between two windows."""

    def __init__(self) -> None:
        self._next: int | None = None  # index of the window that starts from the state
        self._state: State | None = None

    def carry(self, index: int, state: State) -> None:
        """Keeps the state at the end of window ``index``, detached."""
        self._next, self._state = index + 1, _mapped(Tensor.detach, state)

    def forget(self, where: Tensor | None = None) -> None:
        """Resets the state of the next window: always, or if the scalar bool tensor ``where`` is true."""
        self._state = None if where is None else _mapped(lambda kept: kept.masked_fill(where, 0), self._state)

    def state_for(self, index: int) -> State | None:
        """The state that window ``index`` starts from.

        Raises:
            ValueError: there is none: windows are not read in order, or a state was not carried.
        """
        if self._next != index:
            at_hand = "no state was carried" if self._next is None else f"the state is for window {self._next}"
            raise ValueError(
                f"window {index} starts from the state at the end of window {index - 1}, but {at_hand}: read windows "
                "in order, and call window.carry(state) after each one, with None for a model without a state"
            )
        return self._state


@dataclass(frozen=True)
class Window:
    """The next T words of every column: ``inputs`` and ``targets`` (T, B), and the ``state`` after the last window.

    It is the `Batch` of a text: the state that an objective returns is kept for the next window.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    index: int
    begins: bool
    carrier: _Carrier = field(repr=False)

    @property
    def state(self) -> State | None:
        """The state at the end of the previous window; None at the beginning of a text or pass (start from zero).

        Raises:
            ValueError: the kept state is for another window, or none was carried.
        """
        return None if self.begins else self.carrier.state_for(self.index)

    @property
    def examples(self) -> int:
        """B: each column is an example, with one draw of the hyperparameters for the whole window."""
        return self.inputs.shape[1]

    def carry(self, state: State) -> None:
        """Passes ``state``, detached, to the next window."""
        self.carrier.carry(self.index, state)

    def finish(self, outcome: Any) -> Any:
        """Carries the state of (result, state) and returns the result; without a tuple, the state is None."""
        result, state = outcome if isinstance(outcome, tuple) else (outcome, None)
        self.carry(state)
        return result

    def undo(self, where: Tensor | None) -> None:
        self.carrier.forget(where)

    def parts(self) -> Any:
        return self.inputs, self.targets, self.state

    def like(self, parts: Any) -> Window:
        inputs, targets, state = parts
        carrier = _Carrier()
        carrier.carry(0, state)
        return Window(inputs, targets, 1, self.begins, carrier)

    def part(self, examples: slice) -> Window:
        """Some of the columns, for one of several processes, which keeps their state for the next window."""
        return replace(self, inputs=self.inputs[:, examples], targets=self.targets[:, examples])

    def split(self, slices: Sequence[slice]) -> list[Window]:
        """Windows of some of the columns each, which start from the states that ``join`` has kept for them."""
        states = self.state or [None] * len(slices)
        parts = [replace(self.part(columns), carrier=_Carrier()) for columns in slices]
        for part, state in zip(parts, states, strict=True):
            part.carrier.carry(self.index - 1, state)
        return parts

    def join(self, parts: Sequence[Window]) -> None:
        """Keeps the states of the parts for those of the next window."""
        self.carry([part.carrier.state_for(part.index + 1) for part in parts])

    def finish_as(self, other: Any) -> None:
        self.carry(_mapped(Tensor.clone, other.carrier.state_for(other.index + 1)))


class Streams(_Carrier):
    """An endless sequence of windows with the next ``window`` words of each of ``batch_size`` columns of a text.

    Each pass cuts per_pass · window · batch_size consecutive predictions of the text into ``batch_size`` contiguous
    columns, and starts without a state. The seed and the pass decide where in the text it begins, so that the
    predictions left over by one pass, fewer than a batch, are read by others.

    The predictions in window ``index`` depend only on the arguments and ``index``; ``state_dict`` holds the state that
    is also needed to continue in the middle of a pass.

    Args:
        split: inputs and targets (N,), in the order of the text.
        batch_size: the number of columns, B.
        window: the number of words T of each column in a step.
        seed, stream: decide where passes begin; ``stream`` gives texts with the same seed different beginnings.
        device: where to put windows; by default they stay on the device of the split.

    Raises:
        ValueError: the text has fewer words than one batch needs.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        window: int,
        *,
        seed: int,
        stream: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or window < 1:
            raise ValueError(f"Streams: batch_size and window must be at least 1, got {batch_size} and {window}")
        if (wrong := misfit(split, batch_size, window)) is not None:
            raise ValueError(f"batch_size={batch_size} {wrong}")
        self.split, self.batch_size, self.window, self.seed, self.stream = split, batch_size, window, seed, stream
        self.device = device
        self.examples = batch_size * window
        self.per_pass = len(split.targets) // self.examples

    def __getitem__(self, index: int) -> Window:
        """Window number ``index`` of the sequence, which starts at 0 and has no end."""
        number, position = divmod(index, self.per_pass)
        length = self.per_pass * self.window
        start = self._start(number)
        rows = slice(position * self.window, (position + 1) * self.window)
        inputs, targets = (
            part[start : start + self.batch_size * length].view(self.batch_size, length)[:, rows].t().contiguous()
            for part in self.split
        )
        return Window(inputs.to(self.device), targets.to(self.device), index, position == 0, self)

    def _start(self, number: int) -> int:
        spare = len(self.split.targets) - self.per_pass * self.examples
        return int(np.random.default_rng([self.seed, self.stream, number]).integers(spare + 1))

    def examples_of(self, steps: int) -> int:
        return steps * self.examples

    def state_dict(self) -> dict[str, Any]:
        """The state that the next window starts from."""
        return {"next": self._next, "state": _mapped(Tensor.clone, self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned."""
        self._next, self._state = state["next"], state["state"]


class WholeText(_Carrier):
    """Every prediction of a text exactly once, in ``streams`` contiguous columns, about ``size`` words per window.

    The lengths of columns differ by at most one; in the last row, the targets of the shorter ones are ``IGNORED``.
    ``size`` does not affect the context of any prediction, nor any score; ``streams`` does, because each column begins
    without a state.
    """

    def __init__(self, split: Split, streams: int, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        if streams < 1 or size < 1:
            raise ValueError(f"WholeText: streams and size must be at least 1, got {streams} and {size}")
        self.split, self.device = split, device
        count = len(split.targets)
        bounds = torch.arange(min(streams, count) + 1, device=split.targets.device) * count // min(streams, count)
        self._starts, self._ends = bounds[:-1], bounds[1:]
        self.rows = max(1, size // len(self._starts))

    def __iter__(self) -> Iterator[Window]:
        self._next, self._state = None, None
        length = int((self._ends - self._starts).max())
        for index, first in enumerate(range(0, length, self.rows)):
            rows = torch.arange(first, min(first + self.rows, length), device=self._starts.device)
            place = self._starts + rows[:, None]
            over = place >= self._ends
            inputs, targets = (part[place.clamp(max=len(part) - 1)] for part in self.split)
            targets = targets.masked_fill(over, IGNORED)
            yield Window(inputs.to(self.device), targets.to(self.device), index, index == 0, self)


def misfit(split: Split, batch_size: int, window: int) -> str | None:
    """What is wrong with cutting ``split`` into ``batch_size`` columns; None if it is fine."""
    words = len(split.targets)
    if batch_size * window <= words:
        return None
    most = words // window
    cure = f"at most {most} columns" if most else "a smaller window"
    return (
        f"columns of {window} words per step need {batch_size * window:,} words, but the text has {words:,}: use {cure}"
    )


@dataclass(frozen=True)
class ContinuousText:
    """Batches of a text with inputs and targets (N,): ``Streams`` for steps, ``WholeText`` for evaluations.

    Args:
        window: the number of words of each column in a step; gradients reach back no further.
        valid_streams, test_streams: the number of columns that an evaluation cuts the text into.
    """

    window: int = 70
    valid_streams: int = 10
    test_streams: int = 1
    unit: ClassVar[str] = "words"

    def sequence(
        self, split: Split, batch_size: int, *, seed: int, stream: int, device: torch.device | None = None
    ) -> Streams:
        return Streams(split, batch_size, self.window, seed=seed, stream=stream, device=device)

    def whole(self, split: Split, size: int, *, test: bool, device: torch.device | None = None) -> WholeText:
        return WholeText(split, self.test_streams if test else self.valid_streams, size, device)

    def misfit(self, split: Split, batch_size: int) -> str | None:
        return misfit(split, batch_size, self.window)

    def count(self, split: Split) -> int:
        return split.examples


def _mapped(function: Any, state: State | None) -> State | None:
    return pytree.tree_map_only(Tensor, function, state)
