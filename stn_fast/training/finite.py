"""Skips steps with a loss or gradient that is not finite, so that they change no weight, optimizer or statistic.

On the CPU, the loss and gradients are checked before the update. On CUDA, this would make the host wait at every step,
so the device decides whether to apply the update, and the host learns the outcome about a step later.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.sharding import norms_of_shards

MAX_COPIED_NUMBERS = 1 << 16  # most numbers that are copied at every step


class NonFiniteError(RuntimeError):
    """The loss or a gradient of a step is not finite; nothing was updated.

    Attributes:
        step: number of the step.
        reason: which step it was and what is not finite.
    """

    def __init__(self, step: int, reason: str, skipped: int) -> None:
        self.step, self.reason = step, reason
        before = f", nor {'was the one' if skipped == 1 else f'were the {skipped}'} before it" if skipped else ""
        super().__init__(
            f"{reason}; the step was not taken{before}: check its batch and the learning rate, or skip up to k such "
            "steps in a row with skip_nonfinite=k"
        )


@dataclass
class Attempt:
    """A step before its update: the numbers that decide whether the update is applied.

    Attributes:
        kind: "training", "response", "hyperparameter" or "validation".
        step: number of the step.
        loss: scalar.
        parts: (k,), for each part of the gradient a number that is finite only if that part is.
        size: scalar, finite only if all parts are.
        name: a function from indices of parts to their names.
    """

    kind: str
    step: int | Tensor
    loss: Tensor
    parts: Tensor
    size: Tensor
    name: Callable[[list[int]], str]

    def __post_init__(self) -> None:
        self.loss = self.loss.detach().view(())

    @property
    def row(self) -> str:
        """Which steps in a row it is counted with."""
        return f"{self.kind} steps" if self.kind in ("response", "hyperparameter") else "steps"

    def numbers(self) -> Tensor:
        """(2 + k,): loss, size and parts, from which the host decides."""
        return torch.cat([torch.stack([self.loss.to(self.size), self.size]), self.parts])

    def reason(self, loss: float, parts: Sequence[float]) -> str:
        """What is not finite, given the loss and the parts as numbers on the host."""
        wrong = [k for k, part in enumerate(parts) if not math.isfinite(part)]
        if not math.isfinite(loss):
            return f"the {self.kind} loss is {loss} at step {int(self.step)}"
        what = f"gradient of {self.name(wrong)} is not finite" if wrong else "norm of the gradient overflows float32"
        return f"the {what} at {self.kind} step {int(self.step)}"


class Recorded(NamedTuple):
    """An attempt that the device has decided on, and the numbers from which the host learns the decision."""

    attempt: Attempt
    numbers: Tensor


@dataclass
class _Sent:
    """The numbers of an attempt on their way to the host."""

    attempt: Attempt
    numbers: Tensor
    event: torch.cuda.Event | None

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()


@dataclass
class Guard:
    """Applies the updates of steps, and skips those that are not finite.

    Args:
        skip: how many steps in a row are skipped, each with a warning, before one is an error.
        waits: whether the host decides on every step, so that it waits for a CUDA device.

    Attributes:
        skipped: number of steps skipped so far.
        in_a_row: number of steps skipped since the last update, of each row: response steps are counted by themselves,
            because a general step comes before each, and so are hyperparameter steps.
    """

    skip: int
    waits: bool = False
    skipped: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    _warm: set[tuple[int, str]] = field(default_factory=set, repr=False)
    _sent: deque[_Sent] = field(default_factory=deque, repr=False)
    _recorded: list[Recorded] | None = field(default=None, repr=False)

    def take(
        self,
        attempt: Attempt,
        optimizer: torch.optim.Optimizer,
        apply: Callable[[], None],
        undo: Callable[[Tensor | None], None],
    ) -> bool:
        """Calls ``apply``, which updates by ``optimizer``, if the attempt is finite, and ``undo`` otherwise.

        ``undo`` reverts what the forward pass changed: always, or if its scalar bool tensor is true. Returns whether
        the step was taken, as far as the host knows: on CUDA, where the device decides, True.

        Raises:
            NonFiniteError: the attempt is not finite, nor were the ``skip`` attempts before it.
        """
        if self._recorded is not None or (_decides(attempt.loss.device) and self.can_decide(optimizer, attempt.kind)):
            bad = ~(attempt.loss.isfinite() & attempt.size.isfinite())
            _apply_unless(bad, optimizer, apply)
            undo(bad)
            if self._recorded is not None:
                self._recorded.append(Recorded(attempt, attempt.numbers()))
            elif not (bad.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.send(attempt, attempt.numbers())
            return True
        loss, size = attempt.loss.item(), attempt.size.item()
        if math.isfinite(loss) and math.isfinite(size):
            self.in_a_row[attempt.row] = 0
            apply()
            self._warm.add((id(optimizer), attempt.kind))
            return True
        undo(None)
        self._leave_out(attempt, loss, attempt.parts.tolist())
        return False

    def can_decide(self, optimizer: torch.optim.Optimizer, kind: str) -> bool:
        """Whether the device may decide on a step of ``optimizer`` after an attempt of this kind."""
        return not self.waits and self.is_warm(optimizer, kind) and can_skip_on_device(optimizer)

    def is_warm(self, optimizer: torch.optim.Optimizer, kind: str) -> bool:
        """False before the first step, which creates the state: a fused SGD would leave it unwritten if it skipped.

        Attempts of different kinds may step different parameters of one optimizer.
        """
        return (id(optimizer), kind) in self._warm

    @contextmanager
    def recording(self) -> Iterator[list[Recorded]]:
        """Inside, the device decides, and attempts and their numbers are put in the list, not sent to the host."""
        recorded: list[Recorded] = []
        self._recorded = recorded
        try:
            yield recorded
        finally:
            self._recorded = None

    def look(self, *, wait: bool = False) -> None:
        """Checks the attempts whose numbers have arrived on the host; with ``wait``, all attempts.

        Raises:
            NonFiniteError: as ``take``, for an earlier step.
        """
        while self._sent and (wait or self._sent[0].arrived):
            sent = self._sent.popleft()
            if sent.event is not None:
                sent.event.synchronize()
            loss, size, *parts = sent.numbers.tolist()
            if math.isfinite(loss) and math.isfinite(size):
                self.in_a_row[sent.attempt.row] = 0
            else:
                self._leave_out(sent.attempt, loss, parts)

    def send(self, attempt: Attempt, numbers: Tensor) -> None:
        """Starts copying an attempt's ``numbers`` to the host; the caller may overwrite them as soon as it returns."""
        if isinstance(attempt.step, Tensor):
            attempt = replace(attempt, step=attempt.step.clone())  # the next step may be counted in place
        if not numbers.is_cuda:
            self._sent.append(_Sent(attempt, numbers.clone(), None))
            return
        with torch.cuda.device(numbers.device):  # another device may be the current one
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
        self._sent.append(_Sent(attempt, host, event))

    def _leave_out(self, attempt: Attempt, loss: float, parts: Sequence[float]) -> None:
        reason, before = attempt.reason(loss, parts), self.in_a_row.get(attempt.row, 0)
        self.skipped, self.in_a_row[attempt.row] = self.skipped + 1, before + 1
        if before + 1 > self.skip:
            raise NonFiniteError(int(attempt.step), reason, before)
        warnings.warn(f"{reason}; left out, {before + 1} of {self.skip} in a row", RuntimeWarning, stacklevel=4)


class _Kept(NamedTuple):
    """A buffer before a step: the tensor, and a copy of it if a step may write to it."""

    module: nn.Module
    name: str
    tensor: Tensor
    before: Tensor | None


class Buffers:
    """The buffers of a model, such as running statistics, which a forward pass in training mode changes.

    Buffers of at most ``MAX_COPIED_NUMBERS`` numbers are copied at each step; larger ones, such as attention masks,
    only after a change has been seen. Sparse ones are never copied: a step must not write to them in place.
    """

    def __init__(self, model: nn.Module) -> None:
        # A step changes λ and ρ of a converted model only as it updates them.
        self._owners = [one for one in model.modules() if one._buffers and not isinstance(one, TunedHyperparameters)]
        self._large: dict[tuple[int, str], int] = {}  # how often a large buffer had been written to, at the last step
        self._changing: set[tuple[int, str]] = set()

    def keep(self) -> Callable[[Tensor | None], None]:
        """A function that restores the current buffers: always, or if its scalar bool tensor is true."""
        kept = [
            _Kept(module, name, buffer, self._copy(module, name, buffer))
            for module in self._owners
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

        def put_back(where: Tensor | None) -> None:
            for one in kept:
                _put_back(one, one.module._buffers[one.name], where)

        return torch.no_grad()(put_back)

    def statistics(self) -> list[Tensor]:
        """The running means and variances of batch norms that a step changes."""
        return [
            buffer
            for module in self._owners
            if module.training
            for name, buffer in module._buffers.items()
            if name in ("running_mean", "running_var") and buffer is not None
        ]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restores the buffers at the end, as they were at the beginning."""
        put_back = self.keep()
        yield
        put_back(None)

    @contextmanager
    def ignoring_writes(self) -> Iterator[None]:
        """Inside, a write to a large buffer, such as loading a state, does not count as a change made by a step."""
        versions = self._versions()
        self._changing |= {key for key, version in versions.items() if version != self._large[key]}
        try:
            yield
        finally:
            self._large |= self._versions()

    def _versions(self) -> dict[tuple[int, str], int]:
        """How often the large buffers of earlier steps have been written to."""
        found = {(id(module), name): buffer for module in self._owners for name, buffer in module._buffers.items()}
        return {
            key: buffer._version
            for key, buffer in found.items()
            if key in self._large and buffer is not None and not buffer.is_inference()
        }

    def _copy(self, module: nn.Module, name: str, buffer: Tensor) -> Tensor | None:
        """A copy of a buffer that a step may write to; None if it can't be written, or no write has been seen."""
        if not is_writable(buffer):
            return None
        if buffer.numel() > MAX_COPIED_NUMBERS:
            key = id(module), name
            if self._large.setdefault(key, buffer._version) != buffer._version:
                self._changing.add(key)
            if key not in self._changing:
                return None
        return buffer.detach().clone()


def is_writable(tensor: Tensor) -> bool:
    """Whether a copy can be written back to ``tensor``: not if it is an inference, a sparse or an expanded tensor."""
    if tensor.is_inference() or tensor.layout is not torch.strided:
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _put_back(one: _Kept, now: Tensor | None, where: Tensor | None) -> None:
    if one.before is not None:  # its version does not tell: batch norm writes without increasing it
        numbers = one.before if where is None else torch.where(where.to(one.tensor.device), one.before, one.tensor)
        one.tensor.copy_(numbers)
    if now is one.tensor:
        return
    if where is None:  # the buffer was replaced by another tensor
        one.module._buffers[one.name] = one.tensor
    elif now is not None and now.shape == one.tensor.shape and now.dtype == one.tensor.dtype:
        one.module._buffers[one.name] = torch.where(where.to(now.device), one.tensor, now)


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """(k,): the Euclidean norm of each gradient, in float32 or wider, as torch.nn.utils.get_total_norm computes it."""
    if any(map(is_sharded, gradients)):
        return norms_of_shards(gradients)
    entries = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    device = entries[0].device
    if device.type == "cuda" and all(e.device == device and e.dtype == torch.float32 for e in entries):
        return torch.stack(torch._foreach_norm(entries))
    norms = [torch.linalg.vector_norm(e, dtype=torch.promote_types(e.dtype, torch.float32)) for e in entries]
    return torch.stack([norm.to(device) for norm in norms])


def _decides(device: torch.device) -> bool:
    """Whether the device decides on a step, because reading its numbers would make the host wait."""
    return device.type == "cuda"


def _numbers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimizer, and its state tensors on the same device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    return parameters + [value for value in state if value.device == parameters[0].device]


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device can skip a step cheaply: its kernels support that, or there are few numbers to restore."""
    return _skips_by_itself(optimizer) or sum(tensor.numel() for tensor in _numbers(optimizer)) <= MAX_COPIED_NUMBERS


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernels can skip a step, as for torch.amp.GradScaler; those of fused optimizers can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@torch.no_grad()
def _apply_unless(bad: Tensor, optimizer: torch.optim.Optimizer, apply: Callable[[], None]) -> None:
    if _skips_by_itself(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        try:
            apply()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        return
    kept = [(tensor, tensor.clone()) for tensor in _numbers(optimizer)]
    apply()
    for tensor, before in kept:
        tensor.copy_(torch.where(bad, before, tensor))
