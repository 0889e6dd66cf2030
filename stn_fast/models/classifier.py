"""ImageClassifier: augmentation, then a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from stn_fast.conversion import Augment
from stn_fast.conversion.augment import HIGHEST
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.ops.augment import STRENGTHS


class ImageClassifier(nn.Module):
    """Normalised uint8 images (B, C, H, W), augmented in training once converted, then a network that takes them.

    Args:
        space: the hyperparameters; those named in `stn_fast.ops.augment.STRENGTHS` augment training images.
        network: the network.
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
        # Below the bounds of a plain layer, which those of the space may exceed; once tuned, it has those of the space.
        starts = {one.name: min(one.init, 0.99 * HIGHEST.get(one.name, math.inf)) for one in space}
        strengths = {name: start for name, start in starts.items() if name in STRENGTHS}
        self.augmentation = Augment(
            mean=mean, std=std, flip=flip, crop_padding=crop_padding, image_size=image_size, **strengths
        )
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) → logits (B, classes)."""
        # In this layout, max-pooling and plain convolutions take at most half the time on the CPU. On CUDA, it is the
        # only layout that the fused convolution reads.
        return self.network(channels_last(self.augmentation(images)))


def channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in channels_last memory format, with its exact strides even if C is 1."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).flatten(1).view(batch, height, width, channels).permute(0, 3, 1, 2)
