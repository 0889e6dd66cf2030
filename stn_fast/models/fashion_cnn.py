"""The small convolutional network of the Δ-STN paper, for Fashion-MNIST."""

from __future__ import annotations

from typing import Any

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.layers import HyperConv2d
from stn_fast.models.convnet import ConvBlock, ConvNet, Dropouts, head

CHANNELS = (16, 32)


def fashion_cnn(
    space: HyperparameterSpace,
    *,
    in_channels: int = 1,
    image_size: int = 28,
    hidden: int = 1568,
    classes: int = 10,
    response_rank: ResponseRank = None,
) -> ConvNet:
    """Convolutions 1-16-32 (5 x 5, padding 2), each followed by max-pooling, then fully connected 1568-hidden-10.

    All layers are gated. `conv_dropout_1` and `conv_dropout_2` drop whole channels after each convolution,
    `conv_dropout` after those whose own name is not in the space; `fc_dropout_1` drops inputs of the hidden layer and
    `last_dropout` those of the last. `response_rank` is passed to `HyperConv2d` and `HyperLinear`. With n
    hyperparameters and full responses, the network has 4,978,260 + 3,252·n parameters, or 834,964 + 628·n if hidden is
    256.

    Raises:
        ValueError: the images are too small for two halvings.
    """
    side = image_size // 4
    if side < 1:
        raise ValueError(f"fashion_cnn: image_size must be >= 4, because images are halved twice, got {image_size}")
    dropouts = Dropouts(space)
    gated: dict[str, Any] = dict(num_hyperparameters=len(space), response_rank=response_rank)
    blocks = []
    for i, channels in enumerate(CHANNELS, start=1):
        conv = HyperConv2d(in_channels, channels, 5, padding=2, **gated, relu=True)
        dropout = dropouts.of_channels(f"conv_dropout_{i}", "conv_dropout")
        blocks.append(ConvBlock(conv, pool=True, dropout=dropout))
        in_channels = channels
    return ConvNet(blocks, head(space, (in_channels * side**2, hidden, classes), dropouts, response_rank))
