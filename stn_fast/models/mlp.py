"""A multi-layer perceptron, and the fully connected layers of other networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from stn_fast.conversion import GaussianNoise


def mlp(sizes: Sequence[int] = (64, 256, 256, 10)) -> nn.Sequential:
    """Linear layers with ReLU between them: (B, sizes[0]) → logits (B, sizes[-1]).

    Its regularisers, at strength 0, are `input_noise` and `input_dropout` of the input, and `hidden_dropout_1`,
    `hidden_dropout_2`, … after each hidden layer. `tuned` makes their strengths the hyperparameters of these names.

    Args:
        sizes: widths from input to logits.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes must have at least two entries, input and output, got {tuple(sizes)}")
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
