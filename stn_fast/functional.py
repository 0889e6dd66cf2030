"""The operations as functions, in the spirit of torch.nn.functional."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from stn_fast.ops import gated_conv2d as _gated_conv2d
from stn_fast.ops import gated_embedding as _gated_embedding
from stn_fast.ops import gated_linear as _gated_linear
from stn_fast.ops import gated_lstm as _gated_lstm
from stn_fast.ops.augment import augment
from stn_fast.ops.dropout import dropout
from stn_fast.ops.gated_lstm import Weights
from stn_fast.ops.noise import noise
from stn_fast.ops.perturb import perturb
from stn_fast.ops.weight_decay import weight_decay_penalty

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch

__all__ = [
    "Weights",
    "augment",
    "dropout",
    "gated_conv2d",
    "gated_embedding",
    "gated_linear",
    "gated_lstm",
    "noise",
    "perturb",
    "weight_decay_penalty",
]


def response_input(hyper: HyperBatch | Tensor, like: Tensor) -> Tensor:
    """What the gates of a layer see: (B, n), or (n,) where a HyperBatch's examples share one row.

    A HyperBatch's float32 response is cast to the dtype of `like`; a tensor is taken as it is.
    """
    if isinstance(hyper, Tensor):
        return hyper
    response = hyper.response[0] if hyper.shared and len(hyper) else hyper.response
    return response.to(like.dtype)


def check_examples(
    who: str, x: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0, others: Iterable[int] = ()
) -> None:
    """Raises ValueError where a HyperBatch has another number of examples than x; ``others`` could count them too."""
    in_range = -x.ndim <= example_dim < x.ndim
    if not isinstance(hyper, Tensor) and in_range and x.shape[example_dim] != len(hyper):
        fitting = [dim for dim in others if x.shape[dim] == len(hyper)]
        hint = f"; example_dim={fitting[0]} fits" if fitting else ""
        raise ValueError(
            f"{who}: the HyperBatch has {len(hyper)} examples, but x {tuple(x.shape)} has "
            f"{x.shape[example_dim]} in dimension {example_dim}{hint}"
        )


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    hyper: HyperBatch | Tensor,
    example_dim: int = 0,
) -> Tensor:
    """`stn_fast.ops.gated_linear.gated_linear`, which documents it, taking a HyperBatch or its response."""
    h = response_input(hyper, weight)
    check_examples("gated_linear", x, hyper, example_dim, range(x.ndim - 1))
    return _gated_linear.gated_linear(
        x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, example_dim=example_dim
    )


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    hyper: HyperBatch | Tensor,
    *,
    stride: _gated_conv2d.IntOrPair = 1,
    padding: _gated_conv2d.IntOrPair | str = 0,
    dilation: _gated_conv2d.IntOrPair = 1,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """`stn_fast.ops.gated_conv2d.gated_conv2d`, which documents it, taking a HyperBatch or its response."""
    h = response_input(hyper, weight)
    check_examples("gated_conv2d", x, hyper)
    return _gated_conv2d.gated_conv2d(
        x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h,
        stride=stride, padding=padding, dilation=dilation, groups=groups, relu=relu,
    )  # fmt: skip


def gated_lstm(
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    from_input: Weights,
    from_hidden: Weights,
    hyper: HyperBatch | Tensor,
    *,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`stn_fast.ops.gated_lstm.gated_lstm`, which documents it, taking a HyperBatch or its response."""
    h = response_input(hyper, from_input.weight)
    check_examples("gated_lstm", x, hyper, example_dim=1)
    return _gated_lstm.gated_lstm(x, h_0, c_0, from_input, from_hidden, h, reverse=reverse)


def gated_embedding(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    hyper: HyperBatch | Tensor,
    *,
    example_dim: int = 0,
    padding_idx: int | None = None,
    sparse: bool = False,
    rate: Tensor | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    stream: int = 1,
) -> Tensor:
    """`stn_fast.ops.gated_embedding.gated_embedding`, which documents it, taking a HyperBatch or its response."""
    h = response_input(hyper, weight)
    check_examples("gated_embedding", tokens, hyper, example_dim, range(tokens.ndim))
    return _gated_embedding.gated_embedding(
        tokens, weight, response_weight, weight_gate, h, example_dim=example_dim, padding_idx=padding_idx,
        sparse=sparse, rate=rate, seed=seed, step=step, stream=stream,
    )  # fmt: skip
