"""Whole steps as CUDA graphs: one launch in place of the hundreds that Python makes one after the other.

    steps = method.captured()
    for step, batch in enumerate(batches):
        steps.train_step(batch, step)

A graph repeats what the device was asked to do when it was captured, on the memory that it had then. So every captured
step has a batch, a step number and a state of its own, which are filled before each replay, and everything else that
decides a step is compared with what it was: where it differs, the step is captured anew or taken one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.dispatch import choose
from stn_fast.ops.memory import address_to_compare
from stn_fast.training.batches import Batch
from stn_fast.training.finite import Recorded, can_skip_on_device
from stn_fast.training.optimizers import captures
from stn_fast.training.parameters import listed
from stn_fast.training.precision import float32_products
from stn_fast.training.rehearsal import obstacles

if TYPE_CHECKING:
    from stn_fast.training.methods import Kind, Method

Result = TypeVar("Result")

WARM_UP = 1  # steps that are taken one by one first: what is made, compiled or tuned at a first step is there then
MAX_CAPTURES = 8  # of each kind of step


class Graphs(Protocol):
    """Captures work on a device as graphs."""

    def on_capture_stream(self) -> AbstractContextManager[None]:
        """Inside, work is queued on the CUDA stream that captures; work queued after the block waits for it."""

    def capture(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Calls ``function``; its result, whose tensors hold no numbers yet, and a function that computes them."""


class CudaGraphs:
    """Graphs on one CUDA device. Each has memory of its own, so that no other overwrites the gradients it leaves."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # A thread that pins memory for a loader may go on meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def warn(reason: str) -> None:
    """Says why steps are not captured."""
    warnings.warn(reason, RuntimeWarning, stacklevel=5)


class CapturedSteps:
    """The steps of a method, each kind captured as a CUDA graph after its first calls. The numbers are the same.

    A step is taken one by one, as the method itself would, where it can't be captured or where a graph would not do:

    - the first steps of each kind, and a batch that ``begins``, as the first window of a text does;
    - a batch of other shapes than those of the captured one, such as a last one that is smaller;
    - for good, where the step reads numbers back to the host, makes tensors from numbers on the host, has sparse
      gradients, or has an optimizer that keeps its state on the host.

    Each reason but the first is passed to ``warn`` once.

    After a captured step each ``.grad`` is the step's gradient, in memory that the next such step overwrites.

    What Python does at a step is done when it is captured, and not again: an objective or a layer that counts calls, or
    decides by a number on the host that is no setting of a module's mode, must not be captured.

    Args:
        method: the method whose steps these are.
        graphs: what captures; by default CUDA's, and nothing on another device.
        warn: called with each reason.

    Attributes:
        replayed: steps that a graph took.
        reasons: why others were not captured.
    """

    def __init__(self, method: Method, *, graphs: Graphs | None = None, warn: Callable[[str], None] = warn) -> None:
        device = method.location.device
        self.method, self.replayed, self.reasons, self._warn = method, 0, list[str](), warn
        self.graphs = graphs if graphs is not None or not captures(device) else CudaGraphs(device)
        self._training, self._validation = _Step(self, "train_step"), _Step(self, "valid_step")

    def train_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """As the method's, errors included."""
        return self._training.take(batch, step, first_example)

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """As the method's, errors included."""
        return self._validation.take(batch, step, first_example)

    def note(self, reason: str) -> None:
        """Keeps a reason, and passes it on if it is new."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self._warn(reason)


@dataclass
class _Captured:
    """A step as it was captured: what it depends on, the memory it reads, and the memory it writes."""

    signature: Any
    settings: dict[str, Any]
    inputs: list[Tensor | None]
    step: Tensor
    loss: Tensor
    batch: Batch
    recorded: Recorded
    gradients: list[tuple[Tensor, Tensor | None]]
    replay: Callable[[], None]


class _Step:
    """One kind of step: taken one by one, then captured, then replayed."""

    def __init__(self, steps: CapturedSteps, name: str) -> None:
        self._steps, self._method, self._name = steps, steps.method, name
        self._parameters = list(steps.method.model.parameters())
        self._warm, self._times = 0, 0
        self._changed: dict[str, None] = {}  # names of settings for which a graph was given up, in order
        self._seen: Any = None
        self._captured: _Captured | None = None
        self._never = name not in steps.method.kinds
        self._other_shapes = f"{name}: batches differ in shape, and those unlike the captured one are taken one by one"

    def take(self, batch: Any, step: int | Tensor, first_example: int) -> Tensor:
        method, graphs = self._method, self._steps.graphs

        def one_by_one() -> Tensor:
            return getattr(method, self._name)(batch, step, first_example=first_example)

        if not self._never and graphs is None:
            self._give_up(f"CUDA graphs are made on a CUDA device, and the model is on {method.location.device}")
        if self._never or graphs is None:
            return one_by_one()
        batch = method.begin(self._name, batch)
        if batch.begins:
            return one_by_one()
        inputs, structure = pytree.tree_flatten(batch.parts())
        signature, settings = (structure, list(map(_input_signature, inputs))), self._settings(first_example)
        if self._captured is not None and self._captured.settings != settings:
            self._changed.update(dict.fromkeys(_changes(self._captured.settings, settings)))
            self._captured = None
        if self._captured is None:
            if self._seen is not None and self._seen[0] != signature:
                self._steps.note(self._other_shapes)
            if self._seen != (signature, settings):
                self._warm, self._seen = 0, (signature, settings)
            if self._warm < WARM_UP or not method.guard.is_warm(self._kind.optimizer):
                self._warm += 1
                with graphs.on_capture_stream():
                    return one_by_one()
            captured = self._capture(graphs, batch, inputs, step, first_example, signature, settings)
            if isinstance(captured, str):
                self._give_up(captured)
                return one_by_one()
            self._captured = captured
        if self._captured.signature != signature:
            self._steps.note(self._other_shapes)
            return one_by_one()
        return self._replay(self._captured, batch, inputs, step)

    @property
    def _kind(self) -> Kind:
        return self._method.kinds[self._name]

    def _settings(self, first_example: int) -> dict[str, Any]:
        """By name, every setting on the host that a step depends on, and the addresses that it reads and writes."""
        optimizer, device = self._kind.optimizer, self._method.location.device
        name = type(optimizer).__name__
        found = self._method.settings() | {"first_example": first_example}
        found["the memory of parameters"] = [address_to_compare(parameter) for parameter in self._parameters]
        found["requires_grad of parameters"] = [parameter.requires_grad for parameter in self._parameters]
        for index, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                found[f"{key} of {name}" + (f", group {index}" if index else "")] = _setting(value)
        state = [_setting(value) for of_one in optimizer.state.values() for value in of_one.values()]
        found[f"the state of {name}"] = state
        found["autocast"] = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        found["the backend"] = choose(device)
        return found

    def _give_up(self, reason: str) -> None:
        self._never = True
        self._steps.note(f"{self._name} is not captured: {reason}")

    def _capture(
        self,
        graphs: Graphs,
        batch: Batch,
        inputs: list[Any],
        step: int | Tensor,
        first_example: int,
        signature: Any,
        settings: dict[str, Any],
    ) -> _Captured | str:
        """A captured step like this one, of which nothing is computed yet; or why there is none."""
        method, kind = self._method, self._kind
        if not can_skip_on_device(kind.optimizer):
            return f"{type(kind.optimizer).__name__} keeps much and is not fused (fused=True)"
        if self._times == MAX_CAPTURES:
            return f"it has been captured {MAX_CAPTURES} times, as these settings changed: {listed([*self._changed])}"
        if not all(isinstance(one, Tensor | None) for one in inputs):
            return "its batch holds more than tensors"
        own, structure = [None if one is None else one.clone() for one in inputs], pytree.tree_structure(batch.parts())
        number = torch.zeros((), dtype=torch.int64, device=method.location.device).fill_(step)

        def run() -> tuple[Tensor, Batch]:
            given = batch.like(pytree.tree_unflatten(own, structure))
            return kind.body(given, number, first_example), given

        with float32_products(method.precision):
            with graphs.on_capture_stream():
                found = obstacles(method, run)
            if found:
                return listed(found)
            try:
                with method.guard.recording() as recorded:
                    (loss, given), replay = graphs.capture(run)
            except RuntimeError as error:
                first = error.__context__ or error  # ending a capture that has failed is an error too
                return f"CUDA refused it: {str(first).splitlines()[0]}"
        self._times += 1
        gradients = [(p, p.grad) for group in kind.optimizer.param_groups for p in group["params"]]
        return _Captured(signature, settings, own, number, loss, given, recorded[0], gradients, replay)

    def _replay(self, captured: _Captured, batch: Batch, inputs: list[Any], step: int | Tensor) -> Tensor:
        for own, given in zip(captured.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given, non_blocking=True)
        captured.step.fill_(step)
        captured.replay()
        for parameter, gradient in captured.gradients:  # a step taken one by one has replaced them
            parameter.grad = gradient
        self._steps.replayed += 1
        attempt, numbers = captured.recorded
        self._method.guard.send(replace(attempt, step=step), numbers)
        batch.finish_as(captured.batch)  # a copy, as the next replay writes over what this one left
        return captured.loss.clone()


def _input_signature(part: Any) -> Any:
    """The properties of a part of a batch that must equal those of the captured batch."""
    return (part.shape, part.stride(), part.dtype, part.device) if isinstance(part, Tensor) else None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of the settings that differ."""
    return [name for name in before | now if name not in before or name not in now or before[name] != now[name]]


def _setting(value: Any) -> Any:
    """An optimizer's setting in a form that can be compared: the address of a tensor, any other value itself."""
    if isinstance(value, Tensor):
        return address_to_compare(value)
    return list(map(address_to_compare, value)) if isinstance(value, list) else value
