"""Plain modules that torch lacks, for networks of your own: noise, locked dropout, DropConnect and others.

They are regularised with fixed strengths; `convert` makes their strengths tuned hyperparameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.checks import real_number, whole_number


class GaussianNoise(nn.Module):
    """y = x + std · ε with ε ~ N(0, 1) in training mode, for x of any shape; y = x in evaluation mode.

    Args:
        std: standard deviation, in units of x; at least 0.

    Raises:
        ValueError: std is below 0, or no number.
        TypeError: in training mode, x is not of floating point numbers.
    """

    def __init__(self, std: float = 0.1):
        super().__init__()
        if real_number("GaussianNoise", "std", std) < 0:
            raise ValueError(f"GaussianNoise: std must be >= 0, got {std}")
        self.std = std

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.std == 0:
            return input
        return input + self.std * torch.randn_like(floating_point("GaussianNoise", input))

    def extra_repr(self) -> str:
        return f"std={self.std}"


class LockedDropout(nn.Module):
    """Inverted dropout with one mask for all positions along a dimension, such as all time steps.

    It is the dropout of recurrent networks of Gal and Ghahramani (2016): y = x · keep / (1 − p) in training mode, where
    keep, of x's shape but for a 1 in dimension ``dim``, is 0 with probability p, else 1.

    Args:
        p: the rate, in [0, 1).
        dim: the dimension of x that shares a mask: 0 for (T, B, D), 1 for (B, T, D).

    Raises:
        ValueError: p is out of range, or dim is not a whole number or no dimension of x.
        TypeError: in training mode, x is not of floating point numbers.
    """

    def __init__(self, p: float = 0.5, dim: int = 0):
        super().__init__()
        self.p, self.dim = _rate("LockedDropout", p), whole_number("LockedDropout", "dim", dim, 0)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        shape = list(floating_point("LockedDropout", input).shape)
        if self.dim >= len(shape):
            raise ValueError(f"LockedDropout: dim={self.dim} must be a dimension of the input, which is {tuple(shape)}")
        shape[self.dim] = 1
        return input * F.dropout(input.new_ones(shape), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}"


class EmbeddingWithDropout(nn.Embedding):
    """`torch.nn.Embedding` that drops words in training mode: a dropped word is 0 wherever it is in the batch.

    The rows of all others are scaled by 1 / (1 − p) (Gal and Ghahramani, 2016). Every call draws anew; converted, all
    calls of a training step drop the same words. The table is initialised uniformly in ±0.1, as in language models.

    Args:
        num_embeddings, embedding_dim: V, D; and others of torch.nn.Embedding, by name.
        p: the rate, in [0, 1).

    Raises:
        ValueError: p is out of range.
    """

    BOUND = 0.1

    def __init__(self, num_embeddings: int, embedding_dim: int, *, p: float = 0.1, **named: Any):
        super().__init__(num_embeddings, embedding_dim, **named)
        self.p = _rate("EmbeddingWithDropout", p)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.BOUND, self.BOUND)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if not self.training or self.p == 0:
            return rows
        keep = F.dropout(self.weight.new_ones(self.num_embeddings), self.p)
        return rows * keep[input].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class DropConnectLSTM(nn.LSTM):
    """`torch.nn.LSTM` that drops hidden-to-hidden weights in training mode (DropConnect; Merity et al., 2018).

    All examples and time steps of a call have the same masks; converted, all calls of a training step have. It has no
    dropout between its layers; several of it, with `LockedDropout` between them, have.

    Args:
        input_size, hidden_size, num_layers: and others of torch.nn.LSTM, by name, but for dropout and proj_size.
        p: the rate, in [0, 1).

    Raises:
        ValueError: p is out of range, or an input in training mode has not 2 or 3 dimensions.
        TypeError: it is given dropout or proj_size.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, *, p: float = 0.1, **named: Any):
        refused = [name for name in ("dropout", "proj_size") if name in named]
        if refused:
            raise TypeError(f"DropConnectLSTM has no {refused[0]}: use torch.nn.LSTM, or LockedDropout between layers")
        super().__init__(input_size, hidden_size, num_layers, **named)
        self.p = _rate("DropConnectLSTM", p)

    def reset_parameters(self) -> None:
        """As torch's, but weight and bias of a product are drawn after another, as in `stn_fast.HyperLSTM`."""

        def product(name: str) -> tuple[int, bool, bool]:
            _, side, layer, *reverse = name.split("_")
            return int(layer[1:]), bool(reverse), side == "hh"

        for name in sorted(self._flat_weights_names, key=product):
            nn.init.uniform_(getattr(self, name), -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self.training or self.p == 0:
            return super().forward(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"DropConnectLSTM: a {type(input).__name__} is not supported in training mode: pad the sequences"
            )
        if input.ndim not in (2, 3):
            raise ValueError(f"DropConnectLSTM: the input must have 2 or 3 dimensions, got {tuple(input.shape)}")
        if input.ndim == 2:
            y, after = self.forward(input.unsqueeze(self._examples), hx and tuple(one.unsqueeze(1) for one in hx))
            return y.squeeze(self._examples), tuple(one.squeeze(1) for one in after)
        if hx is None:
            directions = 2 if self.bidirectional else 1
            zeros = input.new_zeros(self.num_layers * directions, input.shape[self._examples], self.hidden_size)
            hx = zeros, zeros
        self.check_forward_args(input, hx, None)
        weights = [
            F.dropout(getattr(self, name), self.p) if "weight_hh" in name else getattr(self, name)
            for name in self._flat_weights_names
        ]
        settings = self.bias, self.num_layers, 0.0, True, self.bidirectional, self.batch_first
        y, *after = torch.lstm(input, hx, weights, *settings)
        return y, tuple(after)

    @property
    def _examples(self) -> int:
        """The dimension of the input that counts examples."""
        return 0 if self.batch_first else 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"


class ConvReLU2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by ReLU. Converted, it computes both in one pass."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def floating_point(who: str, input: Tensor) -> Tensor:
    """Returns the input; raises TypeError naming its dtype if that is not of floating point numbers."""
    if isinstance(input, Tensor) and input.is_floating_point():
        return input
    got = input.dtype if isinstance(input, Tensor) else type(input).__name__
    raise TypeError(f"{who}: the input must be a tensor of floating point numbers, got {got}")


def _rate(who: str, p: float) -> float:
    if not 0 <= real_number(who, "p", p) < 1:
        raise ValueError(f"{who}: p must be at least 0 and below 1, got {p}")
    return p
