"""Hyperparameters, the space they span, and a batch of them: one row for every example."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.checks import tensor, whole_number
from stn_fast.ops._draw import check_coordinates
from stn_fast.ops.perturb import (
    BOTH_BOUNDS,
    LOWER_BOUND,
    NO_BOUND,
    RAW_SCALE_BOUNDS,
    UPPER_BOUND,
    constrain,
    perturb,
)

Response = Literal["shifted", "raw", "value"]


def inverse_softplus(y: float) -> float:
    """x with log(1 + eˣ) = y > 0, exact for tiny and for large y."""
    return y + math.log(-math.expm1(-y))


SCALE_BOUNDS = tuple(math.log1p(math.exp(bound)) for bound in RAW_SCALE_BOUNDS)


@dataclass(frozen=True)
class Hyperparameter:
    """One tuned hyperparameter: its range, where it starts, and how widely it is explored.

    The unconstrained location λ maps to the value: low + (high − low)·sigmoid(λ) with both bounds,
    low + softplus(λ) with a lower one, high − softplus(−λ) with an upper one, λ itself with none.

    Args:
        name: how it is looked up, `hyper["name"]`.
        init: constrained value to start from, strictly inside (low, high). For an integer a half, such as
            1.5, starts in the middle of its plateau.
        low, high: bounds, None for unbounded. The upper bound of a dropout rate must be below 1.
        scale: initial standard deviation σ of the perturbation of λ, within [0.0181, 3.0486].
        integer: the value is the floor of the constrained one. No gradient passes through the floor; the
            response of the weights still carries one.
        per_example: each example draws its own perturbation; False draws one for the whole batch.
        response: what the gates of the layers see: "shifted" λ̃ − λ₀ (default, well conditioned), "raw" λ̃ or
            "value" the constrained value (both as published; prone to diverge).

    Raises:
        ValueError: an argument is out of range; the message names the hyperparameter and the argument.
    """

    name: str
    _: KW_ONLY
    init: float
    low: float | None = None
    high: float | None = None
    scale: float = 0.5
    integer: bool = False
    per_example: bool = True
    response: Response = "shifted"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a Hyperparameter wants a name, a non-empty string; got {self.name!r}")
        for field in ("low", "high", "init", "scale"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"hyperparameter {self.name!r}: {field}={value!r} is not a finite number")
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if low >= high:
            raise ValueError(f"hyperparameter {self.name!r}: low={self.low} must be below high={self.high}")
        if not low < self.init < high:
            raise ValueError(f"hyperparameter {self.name!r}: init={self.init} must lie strictly inside ({low}, {high})")
        if not SCALE_BOUNDS[0] <= self.scale <= SCALE_BOUNDS[1]:
            raise ValueError(
                f"hyperparameter {self.name!r}: scale={self.scale} must lie in "
                f"[{SCALE_BOUNDS[0]:.4f}, {SCALE_BOUNDS[1]:.4f}]"
            )
        if self.response not in ("shifted", "raw", "value"):
            raise ValueError(
                f"hyperparameter {self.name!r}: response={self.response!r} must be 'shifted', 'raw' or 'value'"
            )

    @property
    def kind(self) -> int:
        return {
            (False, False): NO_BOUND,
            (True, False): LOWER_BOUND,
            (False, True): UPPER_BOUND,
            (True, True): BOTH_BOUNDS,
        }[self.low is not None, self.high is not None]

    def unconstrained(self, value: float) -> float:
        """λ of a constrained value strictly inside the range; the inverse of the map above, in float64."""
        if self.low is not None and self.high is not None:
            return math.log(value - self.low) - math.log(self.high - value)
        if self.low is not None:
            return inverse_softplus(value - self.low)
        if self.high is not None:
            return -inverse_softplus(self.high - value)
        return value


@dataclass(eq=False)
class HyperBatch:
    """A batch of hyperparameters, one row an example: what a self-tuning model is called with.

    A pytree whose leaves are the three tensors, so it passes through torch.compile, torch.func and
    DistributedDataParallel as they are. `hyper["name"]` is the (B,) column of constrained values.

    Attributes:
        values: (B, n) float32, constrained; each column is contiguous.
        response: (B, n) float32, what the gates see.
        step: 0-dim int64; with `seed` and `first_example` it fixes every random draw made for this batch.
        seed: the run's seed.
        first_example: index of row 0 in the global batch.
        space: the `HyperparameterSpace` the columns belong to.
        shared: all rows are equal, so layers fold their response into plain weights.
    """

    values: Tensor
    response: Tensor
    step: Tensor
    seed: int
    first_example: int
    space: HyperparameterSpace
    shared: bool = False

    def __getitem__(self, name: str) -> Tensor:
        return self.values[:, self.space.index(name)]

    def __len__(self) -> int:
        return self.values.shape[0]


_LEAVES = ("values", "response", "step")
_CONTEXT = ("seed", "first_example", "space", "shared")


def _flatten(hyper: HyperBatch) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(hyper, name) for name in _LEAVES], tuple(getattr(hyper, name) for name in _CONTEXT)


def _flatten_with_keys(hyper: HyperBatch) -> tuple[list[Any], tuple[Any, ...]]:
    leaves, context = _flatten(hyper)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], context


def _unflatten(leaves: Any, context: Any) -> HyperBatch:
    return HyperBatch(*leaves, *context)


pytree.register_pytree_node(
    HyperBatch,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
)


class HyperparameterSpace:
    """An ordered set of hyperparameters and the maps between their unconstrained and constrained values.

    Args:
        hyperparameters: at least one, with distinct names. Their order is the order of columns everywhere.

    Raises:
        ValueError: none given, or a name given twice.
    """

    def __init__(self, hyperparameters: Sequence[Hyperparameter]):
        self.hyperparameters = tuple(hyperparameters)
        for hyperparameter in self.hyperparameters:
            if not isinstance(hyperparameter, Hyperparameter):
                raise TypeError(f"a HyperparameterSpace wants Hyperparameter objects; got {hyperparameter!r}")
        if not self.hyperparameters:
            raise ValueError("a HyperparameterSpace wants at least one Hyperparameter; got none")
        self.names = tuple(h.name for h in self.hyperparameters)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"hyperparameter names must be distinct; given twice: {', '.join(twice)}")
        self._index = {name: k for k, name in enumerate(self.names)}
        rows = [
            (h.kind, h.low or 0.0, h.high or 0.0, h.integer, h.per_example, h.response == "value")
            for h in self.hyperparameters
        ]
        self._table = torch.tensor(rows, dtype=torch.float32)
        self._location = torch.tensor([self._start(h) for h in self.hyperparameters], dtype=torch.float32)
        self._raw_scale = torch.tensor(
            [inverse_softplus(h.scale) for h in self.hyperparameters], dtype=torch.float32
        ).clamp_(*RAW_SCALE_BOUNDS)
        shifted = torch.tensor([h.response == "shifted" for h in self.hyperparameters])
        self._center = self._location * shifted
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def _start(hyperparameter: Hyperparameter) -> float:
        """λ₀, for an integer moved up by the few float32 roundings that would put its floor below `init`."""
        location = hyperparameter.unconstrained(hyperparameter.init)
        if hyperparameter.integer:
            location += 4e-6 * max(1.0, abs(location))
        return location

    def __len__(self) -> int:
        return len(self.hyperparameters)

    def __iter__(self) -> Iterator[Hyperparameter]:
        return iter(self.hyperparameters)

    def __getitem__(self, name: str) -> Hyperparameter:
        return self.hyperparameters[self.index(name)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HyperparameterSpace) and self.hyperparameters == other.hyperparameters

    def __hash__(self) -> int:
        return hash(self.hyperparameters)

    def __repr__(self) -> str:
        return f"HyperparameterSpace({list(self.hyperparameters)})"

    def index(self, name: str) -> int:
        """The column of `name`. Raises KeyError naming those there are."""
        if name not in self._index:
            raise KeyError(f"no hyperparameter {name!r}; this space has {', '.join(self.names)}")
        return self._index[name]

    def with_response(self, response: Response) -> HyperparameterSpace:
        """The same space with every hyperparameter's `response` replaced."""
        return HyperparameterSpace([replace(h, response=response) for h in self.hyperparameters])

    def initial_state(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(location, raw_scale), each (n,) float32, unconstrained: fresh leaves for an optimizer."""
        return self._location.to(device, copy=True), self._raw_scale.to(device, copy=True)

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = self._table.to(device), self._center.to(device)
        return self._on_device[device]

    def _check_location(self, location: Tensor) -> None:
        tensor("HyperparameterSpace", "location", location)
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
    ) -> HyperBatch:
        """Draws every example's own hyperparameters, λ̃ = λ + softplus(ρ)·ε (STN, section 3.2).

        Differentiable to location and raw_scale; wrap in torch.no_grad() for a training step.

        Args:
            location, raw_scale: (n,) float32, as from `initial_state`.
            batch_size: B, the number of examples.
            seed, step: fix every draw; the same pair gives the same batch on every backend. A 0-dim int64
                tensor as step keeps a captured CUDA graph drawing fresh numbers.
            first_example: index of the first row in the global batch, for data parallel training.
            center: (n,) subtracted from λ̃ to give the response; default λ₀ ("shifted") or 0 ("raw").

        Raises:
            ValueError: a shape, dtype or range does not fit; the message names the argument.
        """
        table, default_center = self._constants(location.device)
        self._check_location(location)
        batch_size = whole_number("sample", "batch_size", batch_size, 0)
        step, seed, first_example = check_coordinates("sample", location.device, seed, step, first_example)
        values, response = perturb(
            location,
            raw_scale,
            default_center if center is None else center.detach(),
            table,
            step=step,
            seed=seed,
            batch_size=batch_size,
            first_example=first_example,
        )
        return HyperBatch(values, response, step, seed, first_example, self)

    def at(
        self,
        location: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        step: int | Tensor = 0,
        first_example: int = 0,
        center: Tensor | None = None,
    ) -> HyperBatch:
        """Every example at the unperturbed location; layers then run on folded weights (`shared=True`).

        Arguments as for `sample`; seed and step matter to dropout and noise in training mode alone.
        """
        self._check_location(location)
        batch_size = whole_number("at", "batch_size", batch_size, 0)
        step, seed, first_example = check_coordinates("at", location.device, seed, step, first_example)
        table, default_center = self._constants(location.device)
        values = constrain(location, table)
        shift = location - (default_center if center is None else center.detach())
        response = torch.where(table[:, 5] > 0, values, shift)
        columns = values[:, None].expand(-1, batch_size).contiguous().T
        rows = columns, response.expand(batch_size, -1)
        return HyperBatch(*rows, step, seed, first_example, self, shared=True)

    def scales(self, raw_scale: Tensor) -> Tensor:
        """σ = softplus(clamp(ρ)), (n,), in units of the unconstrained λ."""
        return F.softplus(raw_scale.clamp(*RAW_SCALE_BOUNDS))

    def entropy(self, raw_scale: Tensor) -> Tensor:
        """Entropy of the perturbation in nats, Σ_k log(σ_k sqrt(2πe)): a scalar, differentiable."""
        return self.scales(raw_scale).log().sum() + 0.5 * len(self) * math.log(2 * math.pi * math.e)

    def values(self, location: Tensor) -> dict[str, float]:
        """Constrained values at `location`, by name."""
        self._check_location(location)
        table, _ = self._constants(location.device)
        return dict(zip(self.names, constrain(location.detach(), table).tolist(), strict=True))

    @torch.no_grad()
    def clamp_(self, raw_scale: Tensor) -> Tensor:
        """Puts raw_scale back into RAW_SCALE_BOUNDS, in place; call it after every optimizer step on it."""
        return raw_scale.clamp_(*RAW_SCALE_BOUNDS)
