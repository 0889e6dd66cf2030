"""The first layer of an image network: augments uint8 images, each example with its own strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stn_fast import checks, functional
from stn_fast.errors import did_you_mean
from stn_fast.hyperparameters import HyperBatch, Hyperparameter
from stn_fast.layers.regularisers import _PerExampleRegulariser
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.augment import STRENGTHS, check_settings, domain, per_channel


class PerExampleAugmentation(_PerExampleRegulariser):
    """uint8 images (B, C, H, W) → normalised images in the dtype of the model: the first layer of a network.

    In training mode it applies `stn_fast.functional.augment`, whose docstring gives the effect and order of all
    strengths; in eval mode it only computes (x / 255 − mean) / std.

    Args:
        names: the hyperparameters that are strengths, from `stn_fast.ops.augment.STRENGTHS`; cutout needs both of its
            strengths. Their bounds must be within the strength's domain: low >= 0 for all, high <= 0.5 for hue, < 90
            for shear, < 1 for input_dropout, <= 24 for cutout_holes, <= the side of the images for cutout_length.
        mean, std: one number per channel, for 1 or 3 channels with pixels in [0, 1].
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
        flip: probability of mirroring an image horizontally.
        crop_padding: black pixels added on every side before a crop of the original size is cut.
        image_size: side of the square images that the network takes; others raise an error. None for any size.

    Raises:
        ValueError: a name is unknown or given twice, mean and std have different numbers of channels, or a setting is
            out of range; the message names it.
    """

    _who = "PerExampleAugmentation"  # what errors call it
    _byte_mean: Tensor
    _byte_std: Tensor

    def __init__(
        self,
        names: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        stream: int,
        flip: float = 0.0,
        crop_padding: int = 0,
        image_size: int | None = None,
    ):
        super().__init__(", ".join(names), stream=stream)
        for name in names:
            if name not in STRENGTHS:
                raise ValueError(f"{self._who} has no strength {name!r}; {did_you_mean(name, STRENGTHS)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self._who}: names must be distinct; given twice: {', '.join(twice)}")
        if len(mean) not in (1, 3) or len(mean) != len(std):
            raise ValueError(f"{self._who}: mean and std must both be for 1 or for 3 channels, got {mean} and {std}")
        self.names, who = tuple(names), self._who
        for name, numbers in (("mean", mean), ("std", std)):
            per_channel(who, name, numbers, len(mean))
        self.mean, self.std = tuple(mean), tuple(std)
        self.flip, self.crop_padding = check_settings(who, std, flip, crop_padding)
        self.image_size = None if image_size is None else checks.whole_number(who, "image_size", image_size, 1)
        # Not in the state dict, so a checkpoint of the network loads with or without this layer.
        for name, numbers in (("_byte_mean", mean), ("_byte_std", std)):
            bytes_of = 255 * torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1)
            self.register_buffer(name, bytes_of.float(), persistent=False)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        if not self.training:
            return self.normalised(x)
        self._check_images(x)
        self._check_batch(x, hyper, 0)
        for name in self.names:
            self._check_bounds(hyper.space[name], *x.shape[2:])
        augmented = functional.augment(
            x,
            {name: hyper[name] for name in self.names},
            mean=self.mean,
            std=self.std,
            **self._draw(hyper),
            flip=self.flip,
            crop_padding=self.crop_padding,
        )
        return augmented.to(self._byte_mean.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        """(x / 255 − mean) / std"""
        self._check_images(x)
        return (x - self._byte_mean) / self._byte_std

    def _check_images(self, x: Tensor) -> None:
        check_tensor(self._who, "x", x)
        channels, side = len(self.mean), self.image_size
        fits = x.ndim == 4 and x.shape[1] == channels and (side is None or tuple(x.shape[2:]) == (side, side))
        if x.dtype != torch.uint8 or not fits:
            size = "H, W" if side is None else f"{side}, {side}"
            raise ValueError(
                f"{self._who}: x must be uint8 images (B, {channels}, {size}), to fit mean and image_size; "
                f"the layer normalises them itself; got {tuple(x.shape)} {x.dtype}"
            )

    def _check_bounds(self, hyperparameter: Hyperparameter, height: int, width: int) -> None:
        name, low, high = hyperparameter.name, hyperparameter.low, hyperparameter.high
        allowed = domain(name, height, width)
        greatest = math.inf if high is None and allowed.end < math.inf else high or 0.0
        if low is None or not allowed.holds(low, greatest):
            size = f" for images of {height} x {width}" if name == "cutout_length" else ""
            raise ValueError(
                f"hyperparameter {name!r} is an augmentation strength, so its bounds must keep it {allowed}{size}; "
                f"got low={low}, high={high}"
            )

    def extra_repr(self) -> str:
        settings = {"flip": self.flip, "crop_padding": self.crop_padding, "image_size": self.image_size}
        given = [f"{name}={value}" for name, value in settings.items() if value]
        return ", ".join([repr(list(self.names)), f"stream={self.stream}", *given])
