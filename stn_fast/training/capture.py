"""Whole steps as CUDA graphs: a single launch replaces the hundreds that Python would make one by one.

    steps = method.captured()
    for step, batch in enumerate(batches):
        steps.train_step(batch, step)

A graph repeats the work that the device was given during capture, on the same memory. So every captured step has its
own batch, step number and state, which are filled before each replay. All other settings that affect a step are
compared with those at capture; if they differ, the step is captured again or run without a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
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

WARM_UP = 1  # steps run without a graph before capture, in which state is created and kernels are compiled and tuned
MAX_CAPTURES = 8  # of each kind of step


class Graphs(Protocol):
    """Captures work on a device as graphs."""

    def on_capture_stream(self) -> AbstractContextManager[None]:
        """Inside, work is queued on the CUDA stream for captures; work queued after the block waits for it."""

    def capture(self, function: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Calls ``function``. Returns its result, with tensors not computed yet, and a function to compute them."""


class CudaGraphs:
    """Graphs on one CUDA device. Each has its own memory, so that no other graph overwrites its gradients."""

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
        # thread_local, so that a data loader's thread may pin memory meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def warn(reason: str) -> None:
    """Warns why steps are not captured."""
    warnings.warn(reason, RuntimeWarning, stacklevel=5)


class CapturedSteps:
    """The steps of a method, each kind captured as a CUDA graph after its first calls. The numbers are the same.

    These steps run without a graph, as the method itself would run them:

    - the first steps of each kind, and a batch that ``begins``, such as the first window of a text;
    - a batch whose shapes differ from those of the captured one, such as a smaller last batch;
    - all steps of a kind, if it reads numbers back to the host, makes tensors from numbers on the host, has sparse
      gradients, or its optimizer keeps its state on the host.

    All reasons but the first are passed to ``warn``, once each.

    After a captured step, each ``.grad`` is the step's gradient, in memory that the next such step overwrites.

    Python code runs during capture only. Do not capture an objective or layer that counts its calls, or that branches
    on a number on the host other than a module's training mode.

    Args:
        method: the method whose steps to capture.
        graphs: captures work as graphs; by default CUDA graphs on CUDA, and no capture on other devices.
        warn: called with each reason.

    Attributes:
        replayed: number of steps run by a graph; a training step of two kinds counts as two.
        reasons: why other steps were not captured.
    """

    def __init__(self, method: Method, *, graphs: Graphs | None = None, warn: Callable[[str], None] = warn) -> None:
        device = method.location.device
        self.method, self.replayed, self.reasons, self._warn = method, 0, list[str](), warn
        self.graphs = graphs if graphs is not None or not captures(device) else CudaGraphs(device)
        self._training = [_Step(self, kind) for kind in method.training_kinds]
        self._validation = _Step(self, "valid_step")

    def train_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """The same as the method's, including errors."""
        losses = []
        for kind, view in zip(self._training, self.method.views(batch), strict=True):
            losses.append(kind.take(view, step, first_example))
            if not self.method.took_step:
                break
        self.method.response_loss = losses[1] if len(losses) > 1 else None
        return losses[0]

    def valid_step(self, batch: Any, step: int | Tensor, *, first_example: int = 0) -> Tensor:
        """The same as the method's, including errors."""
        return self._validation.take(batch, step, first_example)

    def note(self, reason: str) -> None:
        """Records a reason, and passes it to ``warn`` if it is new."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self._warn(reason)


@dataclass
class _Captured:
    """A captured step: its settings, the memory that it reads, and the memory that it writes."""

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
    """One kind of step: first run without a graph, then captured, then replayed."""

    def __init__(self, steps: CapturedSteps, name: str) -> None:
        self._steps, self._method, self._name = steps, steps.method, name
        self._parameters = list(steps.method.model.parameters())
        self._warm, self._times = 0, 0
        self._changed: dict[str, None] = {}  # names of changed settings for which graphs were discarded, in order
        self._seen: Any = None
        self._captured: _Captured | None = None
        self._never = name not in steps.method.kinds
        self._other_shapes = f"{name}: batches differ in shape; those unlike the captured one run without a graph"

    def take(self, batch: Any, step: int | Tensor, first_example: int) -> Tensor:
        method, graphs = self._method, self._steps.graphs

        def one_by_one() -> Tensor:
            return getattr(method, self._name)(batch, step, first_example=first_example)

        if not self._never and graphs is None:
            self._give_up(f"CUDA graphs need a CUDA device, and the model is on {method.location.device}")
        elif not self._never and method.uncapturable is not None:
            self._give_up(method.uncapturable)
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
            if self._warm < WARM_UP or not method.guard.is_warm(self._kind.optimizer, self._kind.attempts):
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
        """Every setting on the host that a step depends on, by name, and the addresses that it reads and writes."""
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
        """A captured step like this one, with nothing computed yet; or the reason why it can't be captured."""
        method, kind = self._method, self._kind
        if not can_skip_on_device(kind.optimizer):
            return f"{type(kind.optimizer).__name__} has a large state and is not fused (fused=True)"
        if self._times == MAX_CAPTURES:
            return f"it was captured {MAX_CAPTURES} times because these settings changed: {listed([*self._changed])}"
        if not all(isinstance(one, Tensor | None) for one in inputs):
            return "its batch has parts that are not tensors"
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
                first = error.__context__ or error  # ending a failed capture raises another error
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
        increment_version((self._method.location, self._method.raw_scale))  # a graph changes them, but doesn't count it
        for parameter, gradient in captured.gradients:  # steps without a graph replace them
            parameter.grad = gradient
        self._steps.replayed += 1
        attempt, numbers = captured.recorded
        self._method.guard.send(replace(attempt, step=step), numbers)
        batch.finish_as(captured.batch)  # a copy, because the next replay overwrites the state
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
