"""Layers whose strength is a hyperparameter: dropout and noise per example, DropConnect per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameters import HyperBatch, Hyperparameter
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.draw import stream_number
from stn_fast.ops.transforms import in_function_transform


class _Regulariser(nn.Module):
    """Looks up its strength in the HyperBatch by name, and does nothing in eval mode.

    Args:
        name: the hyperparameter that is the strength.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
    """

    def __init__(self, name: str, *, stream: int):
        super().__init__()
        self.name, self.stream = name, stream_number(type(self).__name__, stream)

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        raise NotImplementedError

    def _check_hyper(self, hyper: HyperBatch) -> None:
        if not isinstance(hyper, HyperBatch):
            raise TypeError(
                f"{type(self).__name__}({self.name!r}): hyper must be a HyperBatch in training mode, got "
                f"{type(hyper).__name__}"
            )

    def _draw(self, hyper: HyperBatch) -> dict[str, Any]:
        """RNG coordinates of this layer."""
        return shared_draw(hyper, self.stream)

    def extra_repr(self) -> str:
        return f"{self.name!r}, stream={self.stream}"


def shared_draw(hyper: HyperBatch, stream: int) -> dict[str, Any]:
    """RNG coordinates of what all examples share, the same at every call and in every process."""
    return dict(seed=hyper.seed, step=hyper.step, stream=stream)


class _PerExampleRegulariser(_Regulariser):
    """Each example has its own strength and its own draws, fixed by its index in the global batch.

    Each further call with the same HyperBatch makes new draws; `HyperBatch.draw_seed` says when a draw is repeated.
    """

    def _check_batch(self, x: Tensor, hyper: HyperBatch, example_dim: int) -> None:
        self._check_hyper(hyper)
        check_tensor(type(self).__name__, "x", x)
        if x.shape[example_dim] != len(hyper):
            raise ValueError(
                f"{type(self).__name__}({self.name!r}): x {tuple(x.shape)} has {x.shape[example_dim]} examples in "
                f"dimension {example_dim}, the HyperBatch has {len(hyper)}"
            )

    def _strength(self, x: Tensor, hyper: HyperBatch, example_dim: int) -> Tensor:
        self._check_batch(x, hyper, example_dim)
        self._check_range(hyper.space[self.name])
        return hyper[self.name]

    def _draw(self, hyper: HyperBatch) -> dict[str, Any]:
        """RNG coordinates of the layer's next call with this batch."""
        return hyper.draw(self.stream)


class _PerBatchRegulariser(_Regulariser):
    """The whole batch shares one strength and one draw, the same at every call and in every process."""

    def _strength(self, hyper: HyperBatch) -> Tensor:
        """The strength, (1,); (0,) for an empty batch."""
        self._check_hyper(hyper)
        hyperparameter = hyper.space[self.name]
        check_shared(hyperparameter, type(self).__name__)
        self._check_range(hyperparameter)
        return hyper[self.name][:1]


def check_rate(hyperparameter: Hyperparameter) -> None:
    """Raises ValueError if a dropout rate could leave [0, 1), or could only be 0."""
    name, (low, high) = hyperparameter.name, hyperparameter.reach
    if low < 0 or high >= 1:
        raise ValueError(
            f"hyperparameter {name!r} is a dropout rate, so its bounds must be 0 <= low and high < 1, "
            f"got low={hyperparameter.low}, high={hyperparameter.high}"
        )
    if hyperparameter.integer:
        raise ValueError(f"hyperparameter {name!r} is a dropout rate, and with integer=True it could only be 0")


class PerExampleDropout(_PerExampleRegulariser):
    """Inverted dropout, each example at its own rate; `stn_fast.functional.dropout` gives the formula.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
        shared_dims: dimensions of x that share one mask.
    """

    def __init__(self, name: str, *, stream: int, shared_dims: Sequence[int] = ()):
        super().__init__(name, stream=stream)
        self.shared_dims = tuple(shared_dims)

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_rate(hyperparameter)

    def forward(self, x: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        if not self.training:
            return x
        return functional.dropout(
            x,
            self._strength(x, hyper, example_dim),
            **self._draw(hyper),
            example_dim=example_dim,
            shared_dims=self.shared_dims,
        )


class PerExampleDropout2d(PerExampleDropout):
    """Dropout of whole channels of images (B, C, H, W), each example at its own rate.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
    """

    def __init__(self, name: str, *, stream: int):
        super().__init__(name, stream=stream, shared_dims=(-2, -1))

    def forward(self, x: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        check_tensor("PerExampleDropout2d", "x", x)
        if x.ndim != 4 or example_dim != 0:
            raise ValueError(
                f"PerExampleDropout2d({self.name!r}): x must be images (B, C, H, W) and example_dim=0, "
                f"got x {tuple(x.shape)} and example_dim={example_dim}"
            )
        if not self.training:
            return x
        return dropped_channels(x, self._strength(x, hyper, example_dim), **self._draw(hyper))


def dropped_channels(x: Tensor, rate: Tensor, **draw: Any) -> Tensor:
    """Images (B, C, H, W) with dropped channels, in the memory format of x."""
    if not in_function_transform() and x.is_contiguous(memory_format=torch.channels_last):
        # Elements of the mask are numbered by channel, so the mask is the same in the memory order of the images.
        return functional.dropout(x.permute(0, 2, 3, 1), rate, **draw, shared_dims=(1, 2)).permute(0, 3, 1, 2)
    return functional.dropout(x, rate, **draw, shared_dims=(-2, -1))


def check_scale(hyperparameter: Hyperparameter) -> None:
    """Raises ValueError if a standard deviation of noise could be negative."""
    if hyperparameter.low is None or hyperparameter.low < 0:
        raise ValueError(
            f"hyperparameter {hyperparameter.name!r} is a noise scale, so its bound low must be >= 0, "
            f"got low={hyperparameter.low}"
        )


def check_shared(hyperparameter: Hyperparameter, layer: str) -> None:
    """Raises ValueError if a hyperparameter that a layer uses for the whole batch differs between examples."""
    if hyperparameter.per_example:
        raise ValueError(
            f"hyperparameter {hyperparameter.name!r} must have per_example=False, because {layer} uses one "
            "strength for the whole batch"
        )


class PerExampleNoise(_PerExampleRegulariser):
    """Additive Gaussian noise, each example with its own standard deviation (in units of x).

    Args:
        name: hyperparameter that is the standard deviation, with a bound low >= 0.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_scale(hyperparameter)

    def forward(self, x: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        if not self.training:
            return x
        return functional.noise(
            x,
            self._strength(x, hyper, example_dim),
            **self._draw(hyper),
            example_dim=example_dim,
        )


class DropConnect(_PerBatchRegulariser):
    """Inverted dropout of a layer's weights: y = W · keep / (1 − rate), one mask for the whole batch.

    Nothing is stored for backward, which draws the mask again. Weights of the same shape get the same mask within a
    step, as W and its response R do.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1 and per_example=False.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_rate(hyperparameter)

    def forward(self, weight: Tensor, hyper: HyperBatch) -> Tensor:
        """W (any shape) → W with entries dropped in training mode."""
        check_tensor("DropConnect", "weight", weight)
        if not self.training:
            return weight
        rate = self._strength(hyper)
        return dropped_weight(weight, rate, **self._draw(hyper)) if len(rate) else weight


def dropped_weight(weight: Tensor, rate: Tensor, **draw: Any) -> Tensor:
    """A weight of any shape with entries dropped at the rate (1,)."""
    return functional.dropout(weight[None], rate, **draw)[0]
