"""The AlexNet of the STN paper, for images of 32 x 32 pixels."""

from __future__ import annotations

from typing import Any

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.layers import HyperConv2d
from stn_fast.models.convnet import ConvBlock, ConvNet, Dropouts, head

CHANNELS = (64, 192, 384, 256, 256)
STRIDES = (2, 1, 1, 1, 1)
POOLED = (True, True, False, False, True)
HIDDEN = (4096, 4096)


def alexnet(
    space: HyperparameterSpace,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    classes: int = 10,
    response_rank: ResponseRank = None,
) -> ConvNet:
    """The STN paper's AlexNet (section 4.2); all layers are gated.

    Convolutions 3-64-192-384-256-256 (3 x 3, padding 1, the first with stride 2, max-pooling after the first, second
    and fifth), then fully connected layers 1024-4096-4096-10.

    `conv_dropout_1` … `conv_dropout_5` drop whole channels after each convolution, `conv_dropout` after those whose own
    name is not in the space; `fc_dropout_1`, `fc_dropout_2`, `last_dropout` drop inputs of the fully connected layers.
    `response_rank` is passed to `HyperConv2d` and `HyperLinear`. With n hyperparameters and full responses, the network
    has 46,544,532 + 18,708·n parameters.

    Raises:
        ValueError: the images are too small for four halvings.
    """
    side = -(-image_size // 2) // 8
    if side < 1:
        raise ValueError(f"alexnet: image_size must be >= 15, because images are halved four times, got {image_size}")
    dropouts = Dropouts(space)
    gated: dict[str, Any] = dict(num_hyperparameters=len(space), response_rank=response_rank)
    blocks = []
    for i, (channels, stride, pooled) in enumerate(zip(CHANNELS, STRIDES, POOLED, strict=True), start=1):
        conv = HyperConv2d(in_channels, channels, 3, stride, 1, **gated, relu=True)
        dropout = dropouts.of_channels(f"conv_dropout_{i}", "conv_dropout")
        blocks.append(ConvBlock(conv, pool=pooled, dropout=dropout))
        in_channels = channels
    return ConvNet(blocks, head(space, (in_channels * side**2, *HIDDEN, classes), dropouts, response_rank))
