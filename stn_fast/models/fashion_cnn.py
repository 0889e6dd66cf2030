"""The small convolutional network of the Δ-STN paper, for Fashion-MNIST."""

from __future__ import annotations

from torch import nn

from stn_fast.conversion import ConvReLU2d
from stn_fast.models.convnet import convnet

CHANNELS = (16, 32)


def fashion_cnn(*, in_channels: int = 1, image_size: int = 28, hidden: int = 1568, classes: int = 10) -> nn.Sequential:
    """Convolutions 1-16-32 (5 x 5, padding 2), each followed by max-pooling, then fully connected 1568-hidden-10.

    `conv_dropout_1` and `conv_dropout_2` drop whole channels after each convolution; `fc_dropout_1` drops inputs of the
    hidden layer and `last_dropout` those of the last. Rates are 0 until `tuned` gives them hyperparameters. With n of
    these and full responses, the network then has 4,978,260 + 3,252·n parameters, or 834,964 + 628·n if hidden is
    256.

    Raises:
        ValueError: the images are too small for two halvings.
    """
    side = image_size // 4
    if side < 1:
        raise ValueError(f"fashion_cnn: image_size must be >= 4, because images are halved twice, got {image_size}")
    layers = [[ConvReLU2d(i, o, 5, padding=2)] for i, o in zip((in_channels, *CHANNELS), CHANNELS, strict=False)]
    return convnet(layers, (True, True), (CHANNELS[-1] * side**2, hidden, classes))
