"""A text read as streams side by side, window after window, and the state that each window leaves for the next.

    streams = Streams(split, 40, 70, seed=0, stream=0)
    for step in range(steps):
        loss = method.train_step(streams[step], step)

The objective sees ``window.state`` and returns (loss, new state); the window hands the new state, detached, back to the
streams, which give it to the next window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.data import Split

# A tensor, or tuples, lists and dictionaries of them: whatever the model makes of its past.
State = Any

IGNORED = -100  # a target that counts for nothing, to torch.nn.functional.cross_entropy too


class _Carrier:
    """Holds the state between two windows."""

    def __init__(self) -> None:
        self._next: int | None = None  # the window that the state is for
        self._state: State | None = None

    def carry(self, index: int, state: State) -> None:
        """Keeps what window ``index`` leaves, cut off from the graph that made it."""
        self._next, self._state = index + 1, _mapped(Tensor.detach, state)

    def forget(self, where: Tensor | None = None) -> None:
        """Lets the next window start from zero: always, or where a scalar tensor of bools on the device is true."""
        self._state = None if where is None else _mapped(lambda kept: kept.masked_fill(where, 0), self._state)

    def state_for(self, index: int) -> State | None:
        """The state that window ``index`` starts from.

        Raises:
            ValueError: it is not there: windows are gone through in another order, or a state was not carried on.
        """
        if self._next != index:
            at_hand = "none has been carried" if self._next is None else f"the one at hand is for window {self._next}"
            raise ValueError(
                f"the state of window {index} is what window {index - 1} leaves, and {at_hand}: take windows in order, "
                "and after each step window.carry(state), with None for a model without one"
            )
        return self._state


@dataclass(frozen=True)
class Window:
    """A stretch of every stream: ``inputs`` and ``targets`` (T, B), and the ``state`` left by the window before.

    The `Batch` of a text: the state that an objective returns is kept for the next window.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    index: int
    begins: bool
    carrier: _Carrier = field(repr=False)

    @property
    def state(self) -> State | None:
        """What the window before left; None where a text or a pass begins, and a model starts from zero.

        Raises:
            ValueError: the state at hand is for another window, or none was carried on.
        """
        return None if self.begins else self.carrier.state_for(self.index)

    @property
    def examples(self) -> int:
        """B: a stream is an example, which has one draw of the hyperparameters all along the window."""
        return self.inputs.shape[1]

    def carry(self, state: State) -> None:
        """Hands ``state``, detached, to the next window."""
        self.carrier.carry(self.index, state)

    def finish(self, outcome: Any) -> Any:
        """The first of (result, state), and the state is carried on; what is no tuple is a result without a state."""
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
        return Window(inputs, targets, 1, False, carrier)

    def finish_as(self, other: Any) -> None:
        self.carry(_mapped(Tensor.clone, other.carrier.state_for(other.index + 1)))


class Streams(_Carrier):
    """The endless sequence of windows of ``batch_size`` streams of a text, ``window`` words each.

    A pass reads per_pass · window · batch_size predictions that follow one another in the text, cut into as many
    contiguous streams as ``batch_size`` says. It begins as far into the text as seed and pass decide, so that what one
    pass leaves over, less than a batch, another reads. Each pass starts without a state.

    Which predictions window ``index`` holds depends on nothing but the arguments and ``index``; to go on from the
    middle of a pass, ``state_dict`` has the rest.

    Args:
        split: inputs and targets (N,), in the order of the text.
        batch_size: the number of streams, B.
        window: the number of words T that each stream advances at a step.
        seed, stream: decide where passes begin; texts that draw from one seed are told apart by ``stream``.
        device: where windows go; without one they stay where the split is.

    Raises:
        ValueError: the text holds fewer words than one batch wants.
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
            raise ValueError(f"Streams wants batch_size and window of at least 1; got {batch_size} and {window}")
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

    def state_dict(self) -> dict[str, Any]:
        """What the next window wants to know of the past."""
        return {"next": self._next, "state": _mapped(Tensor.clone, self._state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what ``state_dict`` gave."""
        self._next, self._state = state["next"], state["state"]


class WholeText(_Carrier):
    """Every prediction of a text exactly once, in ``streams`` contiguous streams side by side, about ``size`` at once.

    Streams differ in length by one at most; where the shorter ones have ended, in the last row, targets are
    ``IGNORED``. ``size`` changes no prediction's past, and so no score; the number of streams does, for each begins
    without a state.
    """

    def __init__(self, split: Split, streams: int, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        if streams < 1 or size < 1:
            raise ValueError(f"WholeText wants streams and size of at least 1; got {streams} and {size}")
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
    """What is wrong with so many streams of ``split``, None where they can be cut."""
    words = len(split.targets)
    if batch_size * window <= words:
        return None
    most = words // window
    cure = f"at most {most} streams" if most else "a smaller window"
    return (
        f"streams of {window} words at a step want {batch_size * window:,} words, the text has {words:,}: take {cure}"
    )


@dataclass(frozen=True)
class ContinuousText:
    """Batches of a text whose splits are inputs and targets (N,): ``Streams`` to learn from, ``WholeText`` to evaluate.

    Args:
        window: the words each stream advances at a step, which is as far as gradients reach back.
        valid_streams, test_streams: the streams that an evaluation cuts the text into.
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


def _mapped(function: Any, state: State | None) -> State | None:
    return pytree.tree_map_only(Tensor, function, state)
