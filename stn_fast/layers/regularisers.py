"""Layers whose strength is a hyperparameter: dropout and noise by the example, DropConnect by the batch."""

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
    """Looks its strength up in the HyperBatch by name, and does nothing in eval mode.

    Args:
        name: the hyperparameter that is its strength.
        stream: at least 1; sets its random draws apart from those of the model's other layers.
    """

    def __init__(self, name: str, *, stream: int):
        super().__init__()
        self.name, self.stream = name, stream_number(type(self).__name__, stream)

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        raise NotImplementedError

    def _check_hyper(self, hyper: HyperBatch) -> None:
        if not isinstance(hyper, HyperBatch):
            raise TypeError(
                f"{type(self).__name__}({self.name!r}) draws by a HyperBatch in training mode; got "
                f"{type(hyper).__name__}"
            )

    def _draw(self, hyper: HyperBatch) -> dict[str, Any]:
        """RNG coordinates of this layer."""
        return dict(seed=hyper.seed, step=hyper.step, stream=self.stream)

    def extra_repr(self) -> str:
        return f"{self.name!r}, stream={self.stream}"


class _PerExampleRegulariser(_Regulariser):
    """Each example has a strength of its own, and draws of its own wherever it is in the global batch.

    Each call with one HyperBatch draws anew; `HyperBatch.draw_seed` says what repeats a draw.
    """

    def _check_batch(self, x: Tensor, hyper: HyperBatch, example_dim: int) -> None:
        self._check_hyper(hyper)
        check_tensor(type(self).__name__, "x", x)
        if x.shape[example_dim] != len(hyper):
            raise ValueError(
                f"{type(self).__name__}({self.name!r}): x {tuple(x.shape)} has {x.shape[example_dim]} examples in "
                f"dimension {example_dim}, the HyperBatch {len(hyper)}"
            )

    def _strength(self, x: Tensor, hyper: HyperBatch, example_dim: int) -> Tensor:
        self._check_batch(x, hyper, example_dim)
        self._check_range(hyper.space[self.name])
        return hyper[self.name]

    def _draw(self, hyper: HyperBatch) -> dict[str, Any]:
        """RNG coordinates of this call of the layer, the next with this batch."""
        return dict(super()._draw(hyper), seed=hyper.draw_seed(self.stream), first_example=hyper.first_example)


class _PerBatchRegulariser(_Regulariser):
    """One strength serves the whole batch, and one draw: the same at every call and in every process."""

    def _strength(self, hyper: HyperBatch) -> Tensor:
        """(1,), or (0,) of a batch without examples."""
        self._check_hyper(hyper)
        hyperparameter = hyper.space[self.name]
        if hyperparameter.per_example:
            raise ValueError(
                f"hyperparameter {self.name!r} is the strength of {type(self).__name__}, which is one for the whole "
                "batch; it wants per_example=False"
            )
        self._check_range(hyperparameter)
        return hyper[self.name][:1]


def check_rate(hyperparameter: Hyperparameter) -> None:
    """Raises ValueError where a dropout rate could leave [0, 1), or not leave 0."""
    name, (low, high) = hyperparameter.name, hyperparameter.reach
    if low < 0 or high >= 1:
        raise ValueError(
            f"hyperparameter {name!r} is a dropout rate and wants bounds 0 <= low and high < 1; "
            f"got low={hyperparameter.low}, high={hyperparameter.high}"
        )
    if hyperparameter.integer:
        raise ValueError(f"hyperparameter {name!r} is a dropout rate, and integer=True leaves it nothing but 0")


class PerExampleDropout(_PerExampleRegulariser):
    """Inverted dropout, each example at its own rate; `stn_fast.functional.dropout` gives the formula.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1.
        stream: see the base class.
        shared_dims: dimensions of x along which one mask is used.
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
        stream: see the base class.
    """

    def __init__(self, name: str, *, stream: int):
        super().__init__(name, stream=stream, shared_dims=(-2, -1))

    def forward(self, x: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        check_tensor("PerExampleDropout2d", "x", x)
        if x.ndim != 4 or example_dim != 0:
            raise ValueError(
                f"PerExampleDropout2d({self.name!r}) wants images (B, C, H, W) and example_dim=0; "
                f"got x {tuple(x.shape)} and example_dim={example_dim}"
            )
        if not self.training:
            return x
        draw = dict(rate=self._strength(x, hyper, example_dim), **self._draw(hyper))
        if not in_function_transform() and x.is_contiguous(memory_format=torch.channels_last):
            # The same masks, which count channels alone, on the images as they lie.
            return functional.dropout(x.permute(0, 2, 3, 1), **draw, shared_dims=(1, 2)).permute(0, 3, 1, 2)
        return functional.dropout(x, **draw, shared_dims=self.shared_dims)


class PerExampleNoise(_PerExampleRegulariser):
    """Additive Gaussian noise, each example at its own standard deviation (in units of x).

    Args:
        name: hyperparameter that is the standard deviation, with a bound low >= 0.
        stream: see the base class.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        if hyperparameter.low is None or hyperparameter.low < 0:
            raise ValueError(
                f"hyperparameter {self.name!r} is a noise scale and wants a bound low >= 0; "
                f"got low={hyperparameter.low}"
            )

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

    Nothing is stored for backward, which draws the mask again. Weights of one shape that are passed at one step, as
    W and its response R, have the same mask.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1 and per_example=False.
        stream: at least 1; sets its random draws apart from those of the model's other layers.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_rate(hyperparameter)

    def forward(self, weight: Tensor, hyper: HyperBatch) -> Tensor:
        """Any shape → the same."""
        check_tensor("DropConnect", "weight", weight)
        if not self.training:
            return weight
        rate = self._strength(hyper)
        return functional.dropout(weight[None], rate, **self._draw(hyper))[0] if len(rate) else weight
