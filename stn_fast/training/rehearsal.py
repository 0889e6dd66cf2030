"""A trial of a step, to see whether a CUDA graph could repeat it; all changes are reverted afterwards.

A failed capture may leave torch's random number generator unusable, so obstacles are looked for beforehand.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stn_fast.ops.memory import address_to_compare
from stn_fast.ops.transforms import in_forward_mode
from stn_fast.training.finite import is_writable
from stn_fast.training.parameters import listed

if TYPE_CHECKING:
    from stn_fast.training.methods import Method

_ATEN = torch.ops.aten
_TORCH, _HERE = Path(torch.__file__).parent, Path(__file__)


def obstacles(method: Method, run: Callable[[], Any]) -> list[str]:
    """The reasons why a CUDA graph cannot repeat ``run``, a step of ``method``; an empty list if it can.

    ``run`` is called once, after a step of the same kind. Its changes to weights, gradients, buffers, hyperparameters,
    optimizers and torch's own random number generator are reverted. A tensor that can't be restored is a reason too.
    """
    gradients = {name: parameter.grad for name, parameter in method.model.named_parameters()}
    sparse = [name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse]
    if sparse:
        return [f"gradients are sparse ({listed(sparse)})"]
    device = method.location.device
    trial, memory = HostWork(device), _Memory(method)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), method.guard.recording(), trial:
            run()
    except Exception as error:  # raised only in a trial, for example by compiled code under a TorchDispatchMode
        trial.found.append(f"a trial of it failed: {type(error).__name__}: {error}")
    finally:
        fresh, lost = memory.put_back()
    anew = [f"it creates {listed(fresh)} at each step"] if fresh else []
    return list(dict.fromkeys([*trial.found, *anew, *lost]))


class HostWork(TorchDispatchMode):
    """Records work of the host that a CUDA graph can't repeat.

    This is reading a number or a shape from the device, making a tensor from numbers on the host, and any operation on
    tensors that are not on the device.

    Attributes:
        found: what was found, with the line that called it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        what = self._trouble(func, (args, kwargs, outcome))
        if what is not None:
            self.found.append(f"{what} ({func}{_caller()})")
        return outcome

    def _trouble(self, func: Any, values: tuple[Any, Any, Any]) -> str | None:
        tensors = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
        # Forward-mode AD computes shapes with meta tensors, which is no work of any device.
        devices = {tensor.device for tensor in tensors if not (tensor.is_meta and in_forward_mode())}
        elsewhere = {str(device) for device in devices if device != self._device}
        if elsewhere:
            return f"it uses tensors on {' and '.join(sorted(elsewhere))}, and the step is on {self._device}"
        if torch.Tag.data_dependent_output in func.tags:
            return "it reads a number back to the host"
        if func in _INDEXING:
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in values[0][1])
            return "the shape of a result depends on numbers" if by_mask and not _is_fill(func, values[0]) else None
        if torch.Tag.dynamic_output_shape in func.tags:
            return "the shape of a result depends on numbers"
        if func is _ATEN.lift_fresh.default:
            return "it makes a tensor from numbers on the host"
        return None


_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)


def _is_fill(func: Any, arguments: Any) -> bool:
    """Whether this is x[mask] = number, which torch computes without reading the mask on the host."""
    return func is not _ATEN.index.Tensor and arguments[2].numel() == 1


def _caller() -> str:
    """The innermost line of code outside of torch and this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path != _HERE and _TORCH not in path.parents and not frame.filename.startswith("<"):
            return f", at {path.name}:{frame.lineno}"
    return ""


class _Memory:
    """All tensors that a step of a method may write to, and copies of them."""

    def __init__(self, method: Method) -> None:
        self._states = [optimizer.state for optimizer in method.optimizers]
        self._kept = [(prefix, owner, dict(owner)) for prefix, owner in self._owners(method)]
        self._gradients = [(parameter, parameter.grad) for parameter in method.model.parameters()]
        trained = {id(p) for one in method.optimizers for group in one.param_groups for p in group["params"]}
        # A step replaces the gradients of the parameters that it trains, and adds to those of others.
        added = [
            (f"the gradient of {name}", parameter.grad)
            for name, parameter in method.model.named_parameters()
            if id(parameter) not in trained
        ]
        learnt = [("location", method.location), ("raw_scale", method.raw_scale)]
        held = [(f"{prefix}{name}", value) for prefix, _, tensors in self._kept for name, value in tensors.items()]
        self._numbers = [
            (name, tensor, tensor._version, tensor.detach().clone())
            for name, tensor in [*learnt, *held, *added]
            if isinstance(tensor, Tensor) and is_writable(tensor)
        ]
        self._known = [set(state) for state in self._states]

    @staticmethod
    def _owners(method: Method) -> Iterator[tuple[str, dict[str, Any]]]:
        """(prefix of the names, dict of tensors by name) of every module and optimizer."""
        for name, module in method.model.named_modules():
            for tensors in (module._parameters, module._buffers):
                yield f"{name}." if name else "", tensors
        for optimizer in method.optimizers:
            for of_one in optimizer.state.values():
                yield f"{type(optimizer).__name__}'s ", of_one

    @torch.no_grad()
    def put_back(self) -> tuple[list[str], list[str]]:
        """Restores everything. Returns the names of tensors with a new address, and why others can't be restored."""
        fresh, lost = [], []
        for prefix, owner, before in self._kept:
            fresh += [f"{prefix}{name}" for name, value in owner.items() if _moved(value, before.get(name))]
            owner.clear()
            owner.update(before)
        for state, known in zip(self._states, self._known, strict=True):
            for parameter in [one for one in state if one not in known]:
                fresh += [f"the optimizer's {name}" for name in state.pop(parameter)]
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for name, tensor, version, numbers in self._numbers:
            if tensor._version == version and torch.equal(tensor, numbers):  # batch norm doesn't increase the version
                continue  # copying would count as a write, and large buffers with writes are copied at each step
            try:
                tensor.copy_(numbers)
            except RuntimeError as error:
                lost.append(f"{name} could not be restored after a trial of the step: {str(error).splitlines()[0]}")
        return sorted(set(fresh)), lost


def _moved(value: Any, before: Any) -> bool:
    """Whether a tensor was replaced by another, or any other value changed."""
    if value is before:
        return False
    if isinstance(value, Tensor) and isinstance(before, Tensor):
        return address_to_compare(value) != address_to_compare(before)
    return value != before
