"""Shared parts of the convolutional networks: blocks, a head, dropouts by name, and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.layers import (
    HyperBatchNorm2d,
    HyperConv2d,
    PerExampleAugmentation,
    PerExampleDropout,
    PerExampleDropout2d,
)
from stn_fast.models.mlp import MLP, gated_layers
from stn_fast.ops.augment import STRENGTHS

AUGMENTATION_STREAM = 1


class Dropouts:
    """Creates the dropouts that a space names, each with its own random stream.

    A place in a network has several names, the specific one before shared ones: `conv_dropout_2`, `conv_dropout`. Its
    rate is the first of these in the space; if none is, there is no dropout.
    """

    def __init__(self, space: HyperparameterSpace):
        self._names = space.names
        self._streams = count(AUGMENTATION_STREAM + 1)

    def of_elements(self, *names: str) -> PerExampleDropout | None:
        """Dropout of individual activations."""
        name, stream = self._next(names)
        return PerExampleDropout(name, stream=stream) if name else None

    def of_channels(self, *names: str) -> PerExampleDropout2d | None:
        """Dropout of whole channels."""
        name, stream = self._next(names)
        return PerExampleDropout2d(name, stream=stream) if name else None

    def _next(self, names: Sequence[str]) -> tuple[str | None, int]:
        """Streams are counted for absent dropouts too, so that a mask does not depend on the other dropouts."""
        return next((name for name in names if name in self._names), None), next(self._streams)


class ConvBlock(nn.Module):
    """Gated convolution, optional gated batch norm, ReLU, optional max-pooling by 2, optional dropout."""

    def __init__(
        self,
        conv: HyperConv2d,
        *,
        norm: HyperBatchNorm2d | None = None,
        pool: bool = False,
        dropout: PerExampleDropout | None = None,
    ):
        super().__init__()
        self.conv, self.norm, self.pool, self.dropout = conv, norm, pool, dropout

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """(B, C, H, W) → (B, O, H', W'). Without a norm the convolution applies ReLU itself (relu=True)."""
        x = self.conv(x, hyper)
        if self.norm is not None:
            x = torch.relu(self.norm(x, hyper))
        if self.pool:
            x = F.max_pool2d(x, 2)
        return x if self.dropout is None else self.dropout(x, hyper)


class ConvNet(nn.Module):
    """Convolutional blocks, then fully connected layers."""

    def __init__(self, blocks: Sequence[ConvBlock], head: MLP):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """Normalised images (B, C, H, W) → logits (B, classes)."""
        for block in self.blocks:
            x = block(x, hyper)
        return self.head(x.flatten(1), hyper)


class ImageClassifier(nn.Module):
    """Augmentation of uint8 images, followed by a network.

    Args:
        space: the hyperparameters; those named in `stn_fast.ops.augment.STRENGTHS` augment training images.
        network: called as `network(images, hyper)` with normalised float images.
        mean, std: mean and standard deviation of each channel, in units of pixel / 255.
        image_size: side of the images, which bounds the cutout.
        flip: probability of a horizontal flip.
        crop_padding: black pixels added on every side before a random crop of the original size.
    """

    def __init__(
        self,
        space: HyperparameterSpace,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int | None = None,
        flip: float = 0.0,
        crop_padding: int = 0,
    ):
        super().__init__()
        self.augmentation = PerExampleAugmentation(
            [name for name in space.names if name in STRENGTHS],
            mean=mean,
            std=std,
            stream=AUGMENTATION_STREAM,
            flip=flip,
            crop_padding=crop_padding,
            image_size=image_size,
        )
        self.network = network

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """uint8 images (B, C, H, W) → logits (B, classes)."""
        # In this layout, max-pooling and plain convolutions take at most half the time on the CPU. On CUDA, it is the
        # only layout that the fused convolution reads.
        return self.network(channels_last(self.augmentation(x, hyper)), hyper)


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in channels_last memory format, with its exact strides even if C is 1."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).flatten(1).view(batch, height, width, channels).permute(0, 3, 1, 2)


def head(
    space: HyperparameterSpace, sizes: Sequence[int], dropouts: Dropouts, response_rank: ResponseRank = None
) -> MLP:
    """Gated fully connected layers with ReLU between them, from features `sizes[0]` to logits `sizes[-1]`.

    `fc_dropout_1`, `fc_dropout_2`, … are the dropout rates before each layer, `last_dropout` that before the last one.
    """
    layers = gated_layers(space, sizes, response_rank)
    names = [[f"fc_dropout_{i}"] for i in range(1, len(sizes))]
    names[-1].append("last_dropout")
    return MLP(layers, [dropouts.of_elements(*of_place) for of_place in names], noise=None)
