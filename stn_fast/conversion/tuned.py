"""TunedHyperparameters: the hyperparameters of a converted model, and the batch of them that its layers use."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.conversion.additions import Added
from stn_fast.conversion.report import Entry
from stn_fast.described_space import described, differing
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.ops.transforms import in_transform, traced


class _Seen(NamedTuple):
    """A buffer, and its values at some time."""

    buffer: Tensor
    version: int
    values: Tensor

    @staticmethod
    def now(buffer: Tensor) -> _Seen:
        return _Seen(buffer, _version(buffer), buffer.clone())

    def is_same(self, buffer: Tensor) -> bool:
        """Whether the values are still the same. On a GPU, reading them would wait for the device."""
        if buffer.device != self.values.device:
            return False
        if buffer.is_cpu:
            return torch.equal(buffer, self.values)
        return buffer is self.buffer and _version(buffer) == self.version >= 0


class _Latest(NamedTuple):
    """A response input, and what it was computed from."""

    location: _Seen
    centred: _Seen
    response: Tensor


def _version(buffer: Tensor) -> int:
    """How often it was changed in place; -1 if torch doesn't count it."""
    return -1 if buffer.is_inference() else buffer._version


def _is_captured(location: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which must read the location anew at every replay."""
    return location.is_cuda and torch.cuda.is_current_stream_capturing()


def _another_thread(caller: str) -> RuntimeError:
    return RuntimeError(
        f"{caller}: another thread is using this model with its own hyperparameters; a converted model uses one "
        "HyperBatch at a time, so give each thread a copy of the model (copy.deepcopy)"
    )


class TunedHyperparameters(nn.Module):
    """λ and ρ of a converted model, the child `tuned_hyperparameters` of its root.

    A state dict of the model describes the space, too. `load_state_dict` raises RuntimeError if it is another one, and
    loads a state dict without a description, such as that of the plain model with ``strict=False``.

    Attributes:
        space: the hyperparameters.
        location, raw_scale: buffers (n,) float32, unconstrained. They stay float32 when the model is cast.
        centred: buffer, a bool: whether the response input is 0 at the current location, wherever that is, because
            Δ-STN trains the model. W and b are then the weights at the current hyperparameters.
        report: what `convert` did with each module.
        added: what it did with each addition.
        response_rank: the rank of the responses that it was called with.
        converted: the names of the modules whose class it has changed.
        untuned: the names of those with a rate of dropout or a deviation of noise that is no hyperparameter.
        frozen: the names of the modules that were in evaluation mode when `stn_fast.fit` last trained the model.
        current: the HyperBatch that layers of this thread use now, set by `using`; None outside. It is not saved.
    """

    location: Tensor
    raw_scale: Tensor
    centred: Tensor

    def __init__(
        self,
        space: HyperparameterSpace,
        report: Sequence[Entry] = (),
        added: Sequence[Added] = (),
        response_rank: ResponseRank = "auto",
    ):
        super().__init__()
        location, raw_scale = space.initial_state()
        self.register_buffer("location", location)
        self.register_buffer("raw_scale", raw_scale)
        self.register_buffer("centred", torch.tensor(False))
        self.space, self.report, self.added = space, list(report), list(added)
        self.response_rank = response_rank
        self.converted: list[str] = []
        self.untuned: list[str] = []
        self.frozen: frozenset[str] = frozenset()
        self.current: HyperBatch | None = None
        self._thread: int | None = None
        self._latest: _Latest | None = None

    @contextmanager
    def using(self, hyper: HyperBatch) -> Iterator[None]:
        """Inside, the converted layers use `hyper`. Run the backward pass inside too: checkpointing calls layers in it.

        For a model trained by Δ-STN, make it with `center` at the location, or with ``centred=True`` (`centred`).

        Afterwards, also after an error, the batch used before is used again, so that calls may be nested.

        Raises:
            TypeError: `hyper` is not a HyperBatch.
            ValueError: it is of another space, or on another device than the model's hyperparameters.
            RuntimeError: another thread is inside, whose layers would use this thread's batch.
        """
        self._check(hyper)
        thread, before = threading.get_ident(), (self.current, self._thread)
        if self._thread not in (None, thread):
            raise _another_thread("using")
        self.current, self._thread = hyper, thread
        try:
            yield
        finally:
            self.current, self._thread = before

    def in_use(self) -> HyperBatch | None:
        """`current`, for a layer that is called now.

        Raises:
            RuntimeError: another thread has set it, and no backward pass calls the layer again: those of CUDA devices
                run in threads of their own. Compiled code does not check it.
        """
        if self.current is None or torch.compiler.is_compiling() or self._thread == threading.get_ident():
            return self.current
        if torch._C._current_graph_task_id() == -1:
            raise _another_thread("a converted layer")
        return self.current

    @contextmanager
    def at_location(self) -> Iterator[None]:
        """Inside, no HyperBatch is in use: the converted layers use the current hyperparameters.

        Raises:
            RuntimeError: another thread is inside of `using`, whose layers would get no batch.
        """
        before = self.current, self._thread
        if self._thread not in (None, threading.get_ident()):
            raise _another_thread("at_location")
        self.current = self._thread = None
        try:
            yield
        finally:
            self.current, self._thread = before

    def _check(self, hyper: HyperBatch) -> None:
        if not isinstance(hyper, HyperBatch):
            raise TypeError(f"using: hyper must be a HyperBatch, as from space.sample, got {type(hyper).__name__}")
        if hyper.space != self.space:
            raise ValueError(
                f"using: the HyperBatch is of a space with {', '.join(hyper.space.names)}, the model was converted "
                f"with another one, of {', '.join(self.space.names)}"
            )
        if hyper.values.device != self.location.device:
            raise ValueError(
                f"using: the HyperBatch is on {hyper.values.device}, the model's hyperparameters are on "
                f"{self.location.device}; move it with hyper.to({str(self.location.device)!r})"
            )

    def forward(self, x: Any) -> Any:
        """Returns its input: a root that is a torch.nn.Sequential calls all of its children."""
        return x

    def response(self) -> Tensor:
        """The response input (n,) at the current location. Layers share the result until the location changes."""
        location, latest = self.location, self._latest
        if location.requires_grad or in_transform() or traced(location) or _is_captured(location):
            return self._response_at(location)
        if latest is None or not (latest.location.is_same(location) and latest.centred.is_same(self.centred)):
            with torch.inference_mode(False), torch.no_grad():
                seen = _Seen.now(location), _Seen.now(self.centred)
                latest = self._latest = _Latest(*seen, self._response_at(location))
        return latest.response

    def _response_at(self, location: Tensor) -> Tensor:
        return self.space.at(location, batch_size=1).response[0].masked_fill(self.centred, 0.0)

    def centre(self, centred: bool) -> None:
        """Sets `centred`.

        Raises:
            ValueError: the location has moved, so that the model would compute something else.
        """
        first, _ = self.space.initial_state(self.location.device)
        if bool(self.centred) != centred and not torch.equal(self.location, first):
            there, here = ("stn", "delta-stn") if centred else ("delta-stn", "stn")
            raise ValueError(
                f"the hyperparameters of this model were tuned by {there}, whose response {here} can't go on with: "
                f"use method={there!r}, or convert the model anew"
            )
        self.centred.fill_(centred)

    def values(self) -> dict[str, float]:
        """The current values, by name."""
        return self.space.values(self.location)

    def scales(self) -> dict[str, float]:
        """The current σ of the perturbations, by name, in units of the unconstrained λ."""
        return dict(zip(self.space.names, self.space.scales(self.raw_scale).tolist(), strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TunedHyperparameters:
        """`to`, `double` and others move location and raw scale, but do not cast them."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def get_extra_state(self) -> Tensor:
        """The description of the space: JSON as uint8, because safetensors files hold only tensors."""
        described_in_floats = [
            {key: float(value) if type(value) is int else value for key, value in one.items()}
            for one in described(self.space)
        ]
        return torch.tensor(list(json.dumps(described_in_floats).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the space of a model does not change, and the description has been compared."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict and (difference := self._difference(state_dict[key])):
            error_msgs.append(f"the state dict is of a model that was converted with another space: {difference}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def _difference(self, description: Tensor) -> str:
        """How the described space differs from that of the model; empty if it is the same."""
        saved = json.loads(bytes(description.tolist()))
        names = [one["name"] for one in saved]
        if names != list(self.space.names):
            return f"{', '.join(names)} there, {', '.join(self.space.names)} here, in this order"
        return "; ".join(differing(saved, self.space))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"current": None, "_thread": None, "_latest": None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value:.4g}" for name, value in self.values().items())
