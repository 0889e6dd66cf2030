"""VGG16 with batch norm, for images of 32 x 32 pixels."""

from __future__ import annotations

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.layers import HyperBatchNorm2d, HyperConv2d
from stn_fast.models.convnet import ConvBlock, ConvNet, Dropouts, head

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = (512, 512)


def vgg16(
    space: HyperparameterSpace,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    classes: int = 10,
    response_rank: ResponseRank = None,
) -> ConvNet:
    """VGG16 with batch norm (Simonyan and Zisserman, 2015); all layers are gated, including norms.

    Thirteen 3 x 3 convolutions in five stages, each followed by batch norm, with max-pooling after each stage; then
    fully connected layers 512-512-512-10, as in Δ-STN's experiments.

    `conv_dropout_1` … `conv_dropout_13` drop whole channels after each convolution, `conv_dropout` after those whose
    own name is not in the space; `fc_dropout_1`, `fc_dropout_2`, `last_dropout` drop inputs of the fully connected
    layers. `response_rank` is passed to `HyperConv2d` and `HyperLinear`. With n hyperparameters and full responses, the
    network has 30,498,708 + 14,740·n parameters.

    Raises:
        ValueError: the images are too small for five halvings.
    """
    side = image_size // 2 ** len(STAGES)
    if side < 1:
        raise ValueError(f"vgg16: image_size must be >= 32, because images are halved five times, got {image_size}")
    dropouts, n = Dropouts(space), len(space)
    blocks: list[ConvBlock] = []
    for stage in STAGES:
        for i, channels in enumerate(stage, start=1):
            conv = HyperConv2d(
                in_channels, channels, 3, padding=1, bias=False, num_hyperparameters=n, response_rank=response_rank
            )
            norm = HyperBatchNorm2d(channels, num_hyperparameters=n)
            dropout = dropouts.of_channels(f"conv_dropout_{len(blocks) + 1}", "conv_dropout")
            blocks.append(ConvBlock(conv, norm=norm, pool=i == len(stage), dropout=dropout))
            in_channels = channels
    return ConvNet(blocks, head(space, (in_channels * side**2, *HIDDEN, classes), dropouts, response_rank))
