"""A gated multi-layer perceptron with the regularisers that its space names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.layers import HyperLinear, PerExampleDropout, PerExampleNoise


class MLP(nn.Module):
    """Gated linear layers with ReLU between them. Built by `mlp`."""

    def __init__(
        self,
        layers: Sequence[HyperLinear],
        dropouts: Sequence[PerExampleDropout | None],
        noise: PerExampleNoise | None,
    ):
        super().__init__()
        self.noise = noise
        self.dropouts = nn.ModuleList(d if d is not None else nn.Identity() for d in dropouts)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """(B, sizes[0]) → logits (B, sizes[-1])."""
        if self.noise is not None:
            x = self.noise(x, hyper)
        for i, (dropout, layer) in enumerate(zip(self.dropouts, self.layers, strict=True)):
            x = torch.relu(x) if i else x
            x = dropout(x, hyper) if isinstance(dropout, PerExampleDropout) else x
            x = layer(x, hyper)
        return x


def gated_layers(
    space: HyperparameterSpace, sizes: Sequence[int], response_rank: ResponseRank = None
) -> list[HyperLinear]:
    """Gated linear layers from sizes[0] to sizes[-1]."""
    gated: dict[str, Any] = dict(num_hyperparameters=len(space), response_rank=response_rank)
    return [HyperLinear(i, o, **gated) for i, o in pairwise(sizes)]


def mlp(
    space: HyperparameterSpace, sizes: Sequence[int] = (64, 256, 256, 10), *, response_rank: ResponseRank = None
) -> MLP:
    """An MLP with the regularisers that `space` names.

    `input_noise` is the standard deviation of noise on the input, `input_dropout` the dropout rate of the input, and
    `hidden_dropout_1`, `hidden_dropout_2`, … the dropout rates after each hidden layer. Other names, such as
    `weight_decay`, are left to the training objective.

    Args:
        space: the hyperparameters.
        sizes: widths from input to logits.
        response_rank: passed to `HyperLinear`.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes must have at least two entries, input and output, got {tuple(sizes)}")
    layers = gated_layers(space, sizes, response_rank)
    rates = ["input_dropout", *(f"hidden_dropout_{i}" for i in range(1, len(layers)))]
    dropouts = [PerExampleDropout(name, stream=i) if name in space else None for i, name in enumerate(rates, start=2)]
    noise = PerExampleNoise("input_noise", stream=1) if "input_noise" in space else None
    return MLP(layers, dropouts, noise)
