"""Multi-layer perceptrons: of gated layers, and plain; and the fully connected layers of other networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast.conversion import GaussianNoise
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


def mlp(
    space: HyperparameterSpace, sizes: Sequence[int] = (64, 256, 256, 10), *, response_rank: ResponseRank = None
) -> MLP:
    """An MLP of gated layers with the regularisers that `space` names, which is called with the hyperparameters.

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
    _check("mlp", sizes)
    gated: dict[str, Any] = dict(num_hyperparameters=len(space), response_rank=response_rank)
    layers = [HyperLinear(inputs, outputs, **gated) for inputs, outputs in pairwise(sizes)]
    rates = ["input_dropout", *(f"hidden_dropout_{i}" for i in range(1, len(layers)))]
    dropouts = [PerExampleDropout(name, stream=i) if name in space else None for i, name in enumerate(rates, start=2)]
    noise = PerExampleNoise("input_noise", stream=1) if "input_noise" in space else None
    return MLP(layers, dropouts, noise)


def plain_mlp(sizes: Sequence[int] = (64, 256, 256, 10)) -> nn.Sequential:
    """A plain MLP: linear layers with ReLU between them, (B, sizes[0]) → logits (B, sizes[-1]).

    Its regularisers, at strength 0, are `input_noise` and `input_dropout` of the input, and `hidden_dropout_1`,
    `hidden_dropout_2`, … after each hidden layer. `tuned` makes their strengths the hyperparameters of these names.

    Args:
        sizes: widths from input to logits.

    Raises:
        ValueError: fewer than two sizes.
    """
    _check("plain_mlp", sizes)
    dropouts = ["input_dropout", *(f"hidden_dropout_{i}" for i in range(1, len(sizes) - 1))]
    return nn.Sequential(OrderedDict(input_noise=GaussianNoise(0.0), **fully_connected(sizes, dropouts)))


def fully_connected(sizes: Sequence[int], dropouts: Sequence[str]) -> OrderedDict[str, nn.Module]:
    """Linear layers with ReLU between them, each after dropout with one of these names."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, ((inputs, outputs), dropout) in enumerate(zip(pairwise(sizes), dropouts, strict=True), start=1):
        if number > 1:
            layers[f"relu_{number - 1}"] = nn.ReLU()
        layers[dropout] = nn.Dropout(0.0)
        layers[f"linear_{number}"] = nn.Linear(inputs, outputs)
    return layers


def _check(who: str, sizes: Sequence[int]) -> None:
    if len(sizes) < 2:
        raise ValueError(f"{who}: sizes must have at least two entries, input and output, got {tuple(sizes)}")
