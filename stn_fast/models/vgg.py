"""VGG16 with batch norm, for images of 32 x 32 pixels."""

from __future__ import annotations

from torch import nn

from stn_fast.models.convnet import convnet

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = (512, 512)


def vgg16(*, in_channels: int = 3, image_size: int = 32, classes: int = 10) -> nn.Sequential:
    """VGG16 with batch norm (Simonyan and Zisserman, 2015).

    Thirteen 3 x 3 convolutions in five stages, each followed by batch norm, with max-pooling after each stage; then
    fully connected layers 512-512-512-10, as in Δ-STN's experiments.

    `conv_dropout_1` … `conv_dropout_13` drop whole channels after each convolution; `fc_dropout_1`, `fc_dropout_2` and
    `last_dropout` drop inputs of the fully connected layers. Rates are 0 until `tuned` gives them hyperparameters. With
    n of these and full responses, the network then has 30,498,708 + 14,740·n parameters.

    Raises:
        ValueError: the images are too small for five halvings.
    """
    side = image_size // 2 ** len(STAGES)
    if side < 1:
        raise ValueError(f"vgg16: image_size must be >= 32, because images are halved five times, got {image_size}")
    channels = [one for stage in STAGES for one in stage]
    pooled = [place == len(stage) for stage in STAGES for place in range(1, len(stage) + 1)]
    layers = [
        [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        for inputs, outputs in zip((in_channels, *channels), channels, strict=False)
    ]
    return convnet(layers, pooled, (channels[-1] * side**2, *HIDDEN, classes))
