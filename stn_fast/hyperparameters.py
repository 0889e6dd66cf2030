"""Hyperparameters, the space they span, and a batch of them with one row per example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.checks import switch, whole_number
from stn_fast.hyperparameter import RAW_SCALE_BOUNDS, SCALE_BOUNDS, Hyperparameter, Response, inverse_softplus
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.draw import check_coordinates
from stn_fast.ops.perturb import constrain, perturb_for
from stn_fast.ops.tangents import dual

__all__ = [
    "SCALE_BOUNDS",
    "HyperBatch",
    "Hyperparameter",
    "HyperparameterSpace",
    "Response",
    "inverse_softplus",
]


_Place = tuple[int, int, int]  # which numbers a layer draws: its stream, the first example, one past the last example


@dataclass(eq=False)
class HyperBatch:
    """A batch of hyperparameters, one row per example, that a self-tuning model is called with.

    It is a pytree whose leaves are the three tensors, so torch.compile, torch.func and DistributedDataParallel accept
    it. `hyper["name"]` is the (B,) column of constrained values, `"name" in hyper` tells whether there is one, and
    `hyper[:2]` is the batch of the first two examples.

    Attributes:
        values: (B, n) float32, constrained; each column is contiguous.
        response: (B, n) float32, the response input, which the gates see.
        step: 0-dim int64; with `seed` and `first_example`, it fixes every random draw made for this batch.
        seed: the run's seed.
        first_example: index of row 0 in the global batch.
        space: the `HyperparameterSpace` that the columns belong to.
        shared: whether all rows are equal, so that layers fold their response into plain weights.
        centred: that `response` is 0, so that gated layers are plain layers with their W and b and don't read it; it
            may have a tangent, as from `linearised`.
        calls: the number of each layer's next draw, by stream and examples; shared with slices and `to`.
        open_calls: how many of these draws no backward pass has repeated yet; shared likewise.
        used: the names that have been looked up; shared with slices, `to` and copies.
    """

    values: Tensor
    response: Tensor
    step: Tensor
    seed: int
    first_example: int
    space: HyperparameterSpace
    shared: bool = False
    centred: bool = False
    calls: dict[_Place, int] = field(default_factory=dict, repr=False)
    open_calls: dict[_Place, int] = field(default_factory=dict, repr=False)
    used: dict[str, bool] = field(default_factory=dict, repr=False)

    def draw(self, stream: int) -> dict[str, Any]:
        """RNG coordinates of a layer's next draw for each example from its stream, as arguments of operations."""
        return dict(seed=self.draw_seed(stream), step=self.step, stream=stream, first_example=self.first_example)

    def draw_seed(self, stream: int) -> int:
        """The seed of a layer's next draw from its stream: the run's seed at the first call, a new one at later calls.

        So a layer that is called several times in a network draws new numbers each time; calls with slices are counted
        together if they share examples. Sampling a HyperBatch again with the same seed and step gives the same numbers.
        A copy made by torch.func or tree_map counts from the start.

        Activation checkpointing calls layers again in the backward pass. There, the one draw that has not been repeated
        yet is repeated. (If a checkpointed segment is compiled with fullgraph=True, set
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint to True: counting is a side effect, which
        must be skipped when the segment is recomputed.)

        Raises:
            RuntimeError: the layer is called in a backward pass after several forward calls, so that the draw to
                repeat is ambiguous.
        """
        first, last = self.first_example, self.first_example + len(self)
        shared = [place for place in self.calls if place[0] == stream and place[1] < last and first < place[2]]
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            number = self._repeated(shared)
        else:
            place = stream, first, last
            number = 0
            for other in shared:  # instead of max() over all of them, which torch.compile can't trace
                number = max(number, self.calls[other]) if number else self.calls[other]
            self.calls[place] = number + 1
            self.open_calls[place] = self.open_calls.get(place, 0) + 1
        return (self.seed + (number << 32)) % 2**63  # the low word of the key is the run's own

    def _repeated(self, places: list[_Place]) -> int:
        """The number of the only call at these places that has not been repeated yet; marks it as repeated."""
        waiting = [place for place in places for _ in range(self.open_calls[place])]
        if len(waiting) > 1:
            raise RuntimeError(
                f"the layer with stream {waiting[0][0]} was called {len(waiting)} times with one HyperBatch and again "
                "in the backward pass, as activation checkpointing does, so it is not known which mask to repeat. Use "
                "a separate layer with its own stream for each call, and sample a HyperBatch for each forward pass"
            )
        for place in waiting:
            self.open_calls[place] -= 1
        return max([self.calls[place] for place in waiting or places], default=1) - 1

    @overload
    def __getitem__(self, key: str) -> Tensor: ...

    @overload
    def __getitem__(self, key: slice) -> HyperBatch: ...

    def __getitem__(self, key: str | slice) -> Tensor | HyperBatch:
        """The (B,) column of a name, or a batch of consecutive examples: hyper[:2] has the first two and their draws.

        Raises:
            KeyError: there is no hyperparameter of this name.
            TypeError, ValueError: `key` is something else, or a slice with a step other than 1.
        """
        if isinstance(key, str):
            column = self.space.index(key)
            self.used[key] = True
            return self.values[:, column]
        if not isinstance(key, slice):
            raise TypeError(
                f"a HyperBatch is indexed by a name or by a slice of examples, as in hyper[:2], got {key!r}"
            )
        start, stop, stride = key.indices(len(self))
        if stride != 1:
            raise ValueError(f"a HyperBatch holds consecutive examples: the slice must have step 1, got {stride}")
        rows = slice(start, max(start, stop))
        return replace(
            self,
            values=self.values[rows],
            response=self.response[rows],
            first_example=self.first_example + start,
        )

    def __contains__(self, name: object) -> bool:
        """Whether there is a hyperparameter of this name."""
        return name in self.space.names

    def __iter__(self) -> NoReturn:
        raise TypeError("a HyperBatch is not iterable: loop over hyper.space.names, or over slices such as hyper[0:1]")

    def __len__(self) -> int:
        """B, the number of examples."""
        return self.values.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> HyperBatch:
        """The same batch, with the same draws, on `device`."""
        values = self.values.T.to(device, non_blocking=non_blocking).T  # columns stay contiguous
        response = self.response.to(device, non_blocking=non_blocking)
        return replace(self, values=values, response=response, step=self.step.to(device, non_blocking=non_blocking))

    def repeated(self, rows: int) -> HyperBatch:
        """A batch with `rows` consecutive rows of each example, for gates; it must not be used for draws."""
        if rows == 1:
            return self
        values, response = (tensor.repeat_interleave(rows, 0) for tensor in (self.values, self.response))
        return replace(self, values=values, response=response)

    def linearised(self) -> HyperBatch:
        """The same values and draws, with a response of 0 whose tangent is this batch's response h.

        Only inside `torch.autograd.forward_ad.dual_level`: a model then returns its outputs at h = 0 with the tangent
        J·h.
        """
        response = dual(torch.zeros_like(self.response), self.response)
        return replace(self, response=response, centred=True)


class _Shared:
    """State shared by the copies of a batch. All instances are equal, so the pytree structure does not change."""

    def __init__(self, used: dict[str, bool]):
        self.used = used

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shared)

    def __hash__(self) -> int:
        return 0


_LEAVES = ("values", "response", "step")
_CONTEXT = ("seed", "first_example", "space", "shared", "centred")


def _flatten(hyper: HyperBatch) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(hyper, name) for name in _LEAVES], (
        *(getattr(hyper, name) for name in _CONTEXT),
        _Shared(hyper.used),
    )


def _flatten_with_keys(hyper: HyperBatch) -> tuple[list[Any], tuple[Any, ...]]:
    leaves, context = _flatten(hyper)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], context


def _unflatten(leaves: Any, context: Any) -> HyperBatch:
    *given, shared = context
    hyper = HyperBatch(*leaves, *given)
    hyper.used = shared.used
    return hyper


pytree.register_pytree_node(
    HyperBatch,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
)


class HyperparameterSpace:
    """An ordered set of hyperparameters and the maps between their unconstrained and constrained values.

    Args:
        hyperparameters: at least one, with distinct names; columns are in this order everywhere.

    Raises:
        TypeError: something else than a Hyperparameter is given.
        ValueError: none is given, or a name is given twice.
    """

    def __init__(self, hyperparameters: Sequence[Hyperparameter]):
        self.hyperparameters = tuple(hyperparameters)
        for hyperparameter in self.hyperparameters:
            if not isinstance(hyperparameter, Hyperparameter):
                raise TypeError(f"HyperparameterSpace: expected Hyperparameter objects, got {hyperparameter!r}")
        if not self.hyperparameters:
            raise ValueError("HyperparameterSpace: needs at least one Hyperparameter, got none")
        self.names = tuple(h.name for h in self.hyperparameters)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"hyperparameter names must be distinct; given twice: {', '.join(twice)}")
        self._index = {name: k for k, name in enumerate(self.names)}
        self._table = torch.tensor([h.row for h in self.hyperparameters], dtype=torch.float32)
        self._location = torch.tensor([h.start for h in self.hyperparameters], dtype=torch.float32)
        self._raw_scale = torch.tensor(
            [inverse_softplus(h.scale) for h in self.hyperparameters], dtype=torch.float32
        ).clamp_(*RAW_SCALE_BOUNDS)
        shifted = torch.tensor([h.response == "shifted" for h in self.hyperparameters])
        self._center = self._location * shifted
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.hyperparameters)

    def __iter__(self) -> Iterator[Hyperparameter]:
        return iter(self.hyperparameters)

    def __getitem__(self, name: str) -> Hyperparameter:
        return self.hyperparameters[self.index(name)]

    def __contains__(self, one: object) -> bool:
        """Whether there is a hyperparameter of this name, or this `Hyperparameter`."""
        return one in self.names or one in self.hyperparameters

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HyperparameterSpace) and self.hyperparameters == other.hyperparameters

    def __hash__(self) -> int:
        return hash(self.hyperparameters)

    def __repr__(self) -> str:
        return f"HyperparameterSpace({list(self.hyperparameters)})"

    def index(self, name: str) -> int:
        """The column of `name`. Raises KeyError, with the names that exist, if there is none."""
        if name not in self._index:
            raise KeyError(f"no hyperparameter {name!r}; this space has {', '.join(self.names)}")
        return self._index[name]

    def with_response(self, response: Response) -> HyperparameterSpace:
        """The same space with every hyperparameter's `response` replaced."""
        return HyperparameterSpace([replace(h, response=response) for h in self.hyperparameters])

    def initial_state(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(location, raw_scale), each (n,) float32, unconstrained: new leaf tensors for an optimizer."""
        return self._location.to(device, copy=True), self._raw_scale.to(device, copy=True)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = self._table.to(device), self._center.to(device)
        return self._on_device[device]

    def _check_location(self, location: Tensor) -> None:
        check_tensor("HyperparameterSpace", "location", location)
        if location.shape != (len(self),) or location.dtype != torch.float32:
            raise ValueError(
                f"location must be ({len(self)},) float32, one entry per hyperparameter, "
                f"got {tuple(location.shape)} {location.dtype}"
            )

    def sample(
        self,
        location: Tensor,
        raw_scale: Tensor,
        *,
        batch_size: int,
        seed: int,
        step: int | Tensor,
        first_example: int = 0,
        center: Tensor | None = None,
        antithetic: bool = False,
    ) -> HyperBatch:
        """Draws the hyperparameters of every example, λ̃ = λ + softplus(ρ)·ε (STN, section 3.2).

        Differentiable with respect to location and raw_scale; wrap in torch.no_grad() for a training step.

        Args:
            location, raw_scale: (n,) float32, as from `initial_state`.
            batch_size: B, the number of examples.
            seed, step: fix every draw; the same pair gives the same batch on every backend. Pass step as a 0-dim
                int64 tensor if a captured CUDA graph is to draw new numbers at every replay.
            first_example: index of the first row in the global batch, for data-parallel training.
            center: (n,), subtracted from λ̃ to give the response; by default λ₀ ("shifted") or 0 ("raw").
            antithetic: whether to take λ − softplus(ρ)·ε instead, with the ε of the batch with the same coordinates.
                Dropout masks and noise are drawn from the same uniform numbers in both.

        Raises:
            ValueError: a shape, dtype or range does not fit; the message names the argument.
        """
        table, default_center = self._constants(location.device)
        self._check_location(location)
        center = default_center if center is None else center.detach()
        switch("sample", "antithetic", antithetic)
        if antithetic:
            draw: Any = dict(batch_size=batch_size, seed=seed, step=step, first_example=first_example)
            batch = self._raw.sample(location, raw_scale, **draw)  # its response is λ̃ itself
            opposite = 2 * location - batch.response
            values = constrain(opposite, table).T.contiguous().T  # columns are contiguous
            response = torch.where(table[:, 5] > 0, values, opposite - center).contiguous()  # as of the other pass
            return replace(batch, values=values, response=response, space=self)
        (values, response), coordinates = perturb_for(
            "sample", location, raw_scale, center, table, step, seed, batch_size, first_example
        )
        step, seed, first_example = coordinates
        return HyperBatch(values, response, step, seed, first_example, self)

    @cached_property
    def _raw(self) -> HyperparameterSpace:
        return self.with_response("raw")

    def at(
        self,
        location: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        step: int | Tensor = 0,
        first_example: int = 0,
        center: Tensor | None = None,
        centred: bool = False,
    ) -> HyperBatch:
        """A batch with every example at the unperturbed location; layers then use folded weights (`shared=True`).

        Arguments as for `sample`; seed and step only matter for dropout and noise in training mode. With ``centred``,
        the location itself is the center, so that h is 0 and gated layers are plain ones.
        """
        self._check_location(location)
        batch_size = whole_number("at", "batch_size", batch_size, 0)
        step, seed, first_example = check_coordinates("at", location.device, seed, step, first_example)
        table, default_center = self._constants(location.device)
        values = constrain(location, table)
        columns = values[:, None].expand(-1, batch_size).contiguous().T
        if centred and center is not None:
            raise ValueError("at: give either center or centred=True, which means the location itself")
        if centred:
            response = torch.zeros_like(location)
        else:
            shift = location - (default_center if center is None else center.detach())
            response = torch.where(table[:, 5] > 0, values, shift)
        rows = columns, response.expand(batch_size, -1)
        return HyperBatch(*rows, step, seed, first_example, self, shared=True, centred=centred)

    def scales(self, raw_scale: Tensor) -> Tensor:
        """σ = softplus(clamp(ρ)), (n,), in units of the unconstrained λ."""
        return F.softplus(raw_scale.clamp(*RAW_SCALE_BOUNDS))

    def entropy(self, raw_scale: Tensor) -> Tensor:
        """Entropy of the perturbation in nats, Σ_k log(σ_k sqrt(2πe)): a differentiable scalar."""
        return self.scales(raw_scale).log().sum() + 0.5 * len(self) * math.log(2 * math.pi * math.e)

    def values(self, location: Tensor) -> dict[str, float]:
        """Constrained values at `location`, by name."""
        self._check_location(location)
        table, _ = self._constants(location.device)
        return dict(zip(self.names, constrain(location.detach(), table).tolist(), strict=True))

    @torch.no_grad()
    def clamp_(self, raw_scale: Tensor) -> Tensor:
        """Clamps raw_scale into RAW_SCALE_BOUNDS in place; call it after every optimizer step on raw_scale."""
        return raw_scale.clamp_(*RAW_SCALE_BOUNDS)
