"""Residual networks for CIFAR: ResNet-18, and WideResNets of any depth and width."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _convolution(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each followed by batch norm, and ReLU after the sum (He et al., CVPR 2016).

    The shortcut is the identity, or a projection if the shape changes.

    Args:
        in_channels, channels, stride: of the first convolution; the second keeps the shape.
        dropout: name of the dropout between the two convolutions.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: str):
        super().__init__()
        modules: dict[str, nn.Module] = {
            "conv_1": _convolution(in_channels, channels, stride),
            "norm_1": nn.BatchNorm2d(channels),
            "relu": nn.ReLU(),
            dropout: nn.Dropout(0.0),
            "conv_2": _convolution(channels, channels),
            "norm_2": nn.BatchNorm2d(channels),
        }
        self.residual = nn.Sequential(OrderedDict(modules))
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, channels, H/stride, W/stride)."""
        return torch.relu(self.residual(x) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions (He et al., ECCV 2016), as in WideResNets.

    Arguments and shortcut are those of `BasicBlock`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: str):
        super().__init__()
        self.active = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        modules: dict[str, nn.Module] = {
            "conv_1": _convolution(in_channels, channels, stride),
            "norm_2": nn.BatchNorm2d(channels),
            "relu": nn.ReLU(),
            dropout: nn.Dropout(0.0),
            "conv_2": _convolution(channels, channels),
        }
        self.residual = nn.Sequential(OrderedDict(modules))
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, channels, H/stride, W/stride)."""
        active = self.active(x)
        return self.residual(active) + (x if self.projection is None else self.projection(active))


class ResNet(nn.Module):
    """A convolution, residual blocks, the mean over pixels, dropout and one fully connected layer.

    Batch norm and ReLU follow the convolution if blocks end in an activation, and the last block if they don't.

    Args:
        stem: channels of the first convolution.
        stages: channels of each stage; every stage but the first halves the image in its first block.
        blocks: number of blocks in a stage.
    """

    def __init__(
        self,
        make_block: type[BasicBlock] | type[PreActivationBlock],
        stem: int,
        stages: Sequence[int],
        blocks: int,
        in_channels: int,
        classes: int,
    ):
        super().__init__()
        ends_active = make_block is BasicBlock
        first, last = nn.Sequential(_convolution(in_channels, stem)), nn.Sequential()
        (first if ends_active else last).extend([nn.BatchNorm2d(stem if ends_active else stages[-1]), nn.ReLU()])
        self.first, self.blocks = first, nn.Sequential()
        before = stem
        for number in range(len(stages) * blocks):
            stage, place = divmod(number, blocks)
            stride = 2 if stage and not place else 1
            self.blocks.append(make_block(before, stages[stage], stride, f"block_dropout_{number + 1}"))
            before = stages[stage]
        self.last, self.last_dropout, self.linear = last, nn.Dropout(0.0), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) → logits (B, classes)."""
        features = self.last(self.blocks(self.first(x))).mean((2, 3))
        return self.linear(self.last_dropout(features))


def resnet18(*, in_channels: int = 3, classes: int = 10) -> ResNet:
    """ResNet-18 for small images.

    A 3 x 3 convolution of stride 1 without max-pooling, then four stages of two basic blocks with 64, 128, 256 and 512
    channels. `block_dropout_1` … `block_dropout_8` are dropout between the convolutions of each block, `last_dropout`
    before the last layer, at rate 0 until `tuned` gives them hyperparameters. With n of these and full responses, the
    network then has 22,347,924 + 14,420·n parameters.
    """
    return ResNet(BasicBlock, 64, (64, 128, 256, 512), 2, in_channels, classes)


def wide_resnet(depth: int = 28, width: int = 10, *, in_channels: int = 3, classes: int = 10) -> ResNet:
    """WRN-depth-width (Zagoruyko and Komodakis, 2016).

    Three stages of (depth − 4)/6 pre-activation blocks with 16, 32 and 64 times `width` channels; dropout as in
    `resnet18`. With n hyperparameters and full responses, WRN-28-10 then has 72,958,388 + 28,068·n parameters.

    Raises:
        ValueError: depth is not 6·k + 4 with k at least 1, or width is below 1.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"wide_resnet: depth must be 6·k + 4, such as 10, 16, 22, 28, got {depth}")
    if width < 1:
        raise ValueError(f"wide_resnet: width must be >= 1, got {width}")
    stages = [16 * width, 32 * width, 64 * width]
    return ResNet(PreActivationBlock, 16, stages, (depth - 4) // 6, in_channels, classes)
