"""Residual networks for CIFAR: ResNet-18, and WideResNets of any depth and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.layers import HyperBatchNorm2d, HyperConv2d, PerExampleDropout
from stn_fast.models.convnet import Dropouts, head
from stn_fast.models.mlp import MLP


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: the identity, or a projection if the shape changes.

    Args:
        in_channels, channels, stride: of the first convolution; the second keeps the shape.
        n: number of hyperparameters.
        dropout: dropout between the two convolutions.
        response_rank: passed to the convolutions.
    """

    norm_comes_first = False  # whether norms come before the convolutions; if not, the projection has one too

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        n: int,
        dropout: PerExampleDropout | None,
        response_rank: ResponseRank,
    ):
        super().__init__()
        self.norm1 = HyperBatchNorm2d(in_channels if self.norm_comes_first else channels, num_hyperparameters=n)
        gated: dict[str, Any] = dict(bias=False, num_hyperparameters=n, response_rank=response_rank)
        self.conv1 = HyperConv2d(in_channels, channels, 3, stride, 1, **gated)
        self.norm2 = HyperBatchNorm2d(channels, num_hyperparameters=n)
        self.conv2 = HyperConv2d(channels, channels, 3, 1, 1, **gated)
        self.dropout = dropout
        self.projection: HyperConv2d | None = None
        if stride != 1 or in_channels != channels:
            self.projection = HyperConv2d(in_channels, channels, 1, stride, **gated)
        self.projection_norm: HyperBatchNorm2d | None = None
        if self.projection is not None and not self.norm_comes_first:
            self.projection_norm = HyperBatchNorm2d(channels, num_hyperparameters=n)

    def _dropped(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        return x if self.dropout is None else self.dropout(x, hyper)


class BasicBlock(ResidualBlock):
    """Norm after each convolution, ReLU after the sum (He et al., CVPR 2016)."""

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """(B, in_channels, H, W) → (B, channels, H/stride, W/stride)."""
        y = self._dropped(torch.relu(self.norm1(self.conv1(x, hyper), hyper)), hyper)
        y = self.norm2(self.conv2(y, hyper), hyper)
        if self.projection is not None and self.projection_norm is not None:
            x = self.projection_norm(self.projection(x, hyper), hyper)
        return torch.relu(y + x)


class PreActivationBlock(ResidualBlock):
    """Norm and ReLU before each convolution (He et al., ECCV 2016), as in WideResNets."""

    norm_comes_first = True

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """(B, in_channels, H, W) → (B, channels, H/stride, W/stride)."""
        active = torch.relu(self.norm1(x, hyper))
        y = torch.relu(self.norm2(self.conv1(active, hyper), hyper))
        y = self.conv2(self._dropped(y, hyper), hyper)
        return y + (x if self.projection is None else self.projection(active, hyper))


class ResNet(nn.Module):
    """A convolution, residual blocks, the mean over pixels, one fully connected layer.

    Norm and ReLU follow the convolution if blocks end in an activation (`first_norm`), and the last block if they
    don't (`last_norm`).
    """

    def __init__(
        self,
        conv: HyperConv2d,
        blocks: Sequence[ResidualBlock],
        head: MLP,
        *,
        first_norm: HyperBatchNorm2d | None = None,
        last_norm: HyperBatchNorm2d | None = None,
    ):
        super().__init__()
        self.conv, self.first_norm = conv, first_norm
        self.blocks = nn.ModuleList(blocks)
        self.last_norm, self.head = last_norm, head

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """Normalised images (B, C, H, W) → logits (B, classes)."""
        x = self.conv(x, hyper)
        if self.first_norm is not None:
            x = torch.relu(self.first_norm(x, hyper))
        for block in self.blocks:
            x = block(x, hyper)
        if self.last_norm is not None:
            x = torch.relu(self.last_norm(x, hyper))
        return self.head(x.mean((2, 3)), hyper)


def resnet18(
    space: HyperparameterSpace, *, in_channels: int = 3, classes: int = 10, response_rank: ResponseRank = None
) -> ResNet:
    """ResNet-18 for small images; all layers are gated, including norms.

    A 3 x 3 convolution of stride 1 without max-pooling, then four stages of two basic blocks with 64, 128, 256 and 512
    channels. `block_dropout_1` … `block_dropout_8` are the dropout rates between the convolutions of each block,
    `block_dropout` for blocks whose own name is not in the space, `last_dropout` before the last layer. `response_rank`
    is passed to `HyperConv2d` and `HyperLinear`. With n hyperparameters and full responses, the network has
    22,347,924 + 14,420·n parameters.
    """
    return _resnet(space, BasicBlock, 64, (64, 128, 256, 512), 2, in_channels, classes, response_rank)


def wide_resnet(
    space: HyperparameterSpace,
    depth: int = 28,
    width: int = 10,
    *,
    in_channels: int = 3,
    classes: int = 10,
    response_rank: ResponseRank = None,
) -> ResNet:
    """WRN-depth-width (Zagoruyko and Komodakis, 2016); all layers are gated, including norms.

    Three stages of (depth − 4)/6 pre-activation blocks with 16, 32 and 64 times `width` channels; dropouts as in
    `resnet18`. `response_rank` is passed to `HyperConv2d` and `HyperLinear`. With n hyperparameters and full responses,
    WRN-28-10 has 72,958,388 + 28,068·n parameters.

    Raises:
        ValueError: depth is not 6·k + 4 with k at least 1, or width is below 1.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"wide_resnet: depth must be 6·k + 4, such as 10, 16, 22, 28, got {depth}")
    if width < 1:
        raise ValueError(f"wide_resnet: width must be >= 1, got {width}")
    channels = [16 * width, 32 * width, 64 * width]
    return _resnet(space, PreActivationBlock, 16, channels, (depth - 4) // 6, in_channels, classes, response_rank)


def _resnet(
    space: HyperparameterSpace,
    make_block: type[BasicBlock] | type[PreActivationBlock],
    stem: int,
    stages: Sequence[int],
    blocks_in_a_stage: int,
    in_channels: int,
    classes: int,
    response_rank: ResponseRank,
) -> ResNet:
    """A ResNet in which every stage but the first halves the image in its first block."""
    dropouts, n = Dropouts(space), len(space)
    gated: dict[str, Any] = dict(num_hyperparameters=n, response_rank=response_rank)
    conv = HyperConv2d(in_channels, stem, 3, padding=1, bias=False, **gated)
    blocks: list[ResidualBlock] = []
    before = stem
    for number, channels in enumerate(stages):
        for position in range(blocks_in_a_stage):
            stride = 2 if number and not position else 1
            dropout = dropouts.of_elements(f"block_dropout_{len(blocks) + 1}", "block_dropout")
            blocks.append(make_block(before, channels, stride, n, dropout, response_rank))
            before = channels
    classifier = head(space, (before, classes), dropouts, response_rank)
    if make_block.norm_comes_first:
        return ResNet(conv, blocks, classifier, last_norm=HyperBatchNorm2d(before, num_hyperparameters=n))
    return ResNet(conv, blocks, classifier, first_norm=HyperBatchNorm2d(stem, num_hyperparameters=n))
