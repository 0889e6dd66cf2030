"""The AlexNet of the STN paper, for images of 32 x 32 pixels."""

from __future__ import annotations

from torch import nn

from stn_fast.conversion import ConvReLU2d
from stn_fast.models.convnet import convnet

CHANNELS = (64, 192, 384, 256, 256)
STRIDES = (2, 1, 1, 1, 1)
POOLED = (True, True, False, False, True)
HIDDEN = (4096, 4096)


def alexnet(*, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> nn.Sequential:
    """The STN paper's AlexNet (section 4.2).

    Convolutions 3-64-192-384-256-256 (3 x 3, padding 1, the first with stride 2, max-pooling after the first, second
    and fifth), then fully connected layers 1024-4096-4096-10.

    `conv_dropout_1` … `conv_dropout_5` drop whole channels after each convolution; `fc_dropout_1`, `fc_dropout_2` and
    `last_dropout` drop inputs of the fully connected layers. Rates are 0 until `tuned` gives them hyperparameters. With
    n of these and full responses, the network then has 46,544,532 + 18,708·n parameters.

    Raises:
        ValueError: the images are too small for four halvings.
    """
    side = -(-image_size // 2) // 8
    if side < 1:
        raise ValueError(f"alexnet: image_size must be >= 15, because images are halved four times, got {image_size}")
    inputs = (in_channels, *CHANNELS)
    layers = [[ConvReLU2d(i, o, 3, stride, 1)] for i, o, stride in zip(inputs, CHANNELS, STRIDES, strict=False)]
    return convnet(layers, POOLED, (CHANNELS[-1] * side**2, *HIDDEN, classes))
