"""Augment: a first layer for networks of images, which `convert` makes one of augmentation with tuned strengths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stn_fast.conversion.converted import Converted
from stn_fast.hyperparameter import Hyperparameter
from stn_fast.layers.augmentation import PerExampleAugmentation

HIGHEST = {"hue": 0.5, "shear": 80.0, "cutout_holes": 24.0, "input_dropout": 0.95}  # other strengths have no bound
SCALE = 1.0


class AugmentLayer(PerExampleAugmentation):
    """The layer in an `Augment`, whose errors name that."""

    _who = "Augment"


class Augment(nn.Module):
    """uint8 images (B, C, H, W) → normalised float images, augmented in training with strengths that are tuned.

        model = nn.Sequential(stn.Augment(mean=(0.5,), std=(0.25,), rotation=5.0, translation=0.05), network)
        tuned = stn.convert(model)

    `convert` makes it a `PerExampleAugmentation`, and its strengths join the space under their names: in training mode,
    each image is augmented with its own strengths, as `stn_fast.functional.augment` says. In evaluation mode, and in a
    plain model in either mode, it only computes (x / 255 − mean) / std. `fold` makes it a plain one again.

    Args:
        mean, std: one number per channel, for 1 or 3 channels with pixels in [0, 1].
        flip: probability of mirroring an image horizontally; not tuned.
        crop_padding: black pixels added on every side before a crop of the original size is cut; not tuned.
        image_size: side of square images; others raise an error. None for any size.
        strengths: the first value of each, by the names in `stn_fast.ops.augment.STRENGTHS`. The range of most is
            [0, ∞); that of hue is [0, 0.5), of shear [0, 80), of input_dropout [0, 0.95), of cutout_holes [0, 24), and
            of cutout_length [0, image_size). Cutout needs both of its strengths, and image_size.

    Raises:
        ValueError: a strength is unknown or out of range, or another argument is; the message names it.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        flip: float = 0.0,
        crop_padding: int = 0,
        image_size: int | None = None,
        **strengths: float,
    ) -> None:
        super().__init__()
        settings = dict(flip=flip, crop_padding=crop_padding, image_size=image_size)
        self.layer = AugmentLayer(list(strengths), mean=mean, std=std, stream=1, **settings)  # type: ignore[arg-type]
        cutout = [name for name in ("cutout_length", "cutout_holes") if name in strengths]
        if len(cutout) == 1 or (cutout and image_size is None):
            raise ValueError(
                "Augment: cutout needs cutout_length, cutout_holes and image_size, the side of the images, got "
                f"{', '.join(cutout)} and image_size={image_size}"
            )
        self.hyperparameters = tuple(self._hyperparameter(name, init) for name, init in strengths.items())

    def _hyperparameter(self, name: str, init: float) -> Hyperparameter:
        high = self.layer.image_size if name == "cutout_length" else HIGHEST.get(name)
        is_whole = name.startswith("cutout")
        return Hyperparameter(name, low=0.0, high=high, init=init, scale=SCALE, integer=is_whole)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer.normalised(images)


class TunedAugment(Converted, Augment):
    """`PerExampleAugmentation`"""

    def forward(self, images: Tensor) -> Tensor:
        hyper = self.hyper
        return self.layer.normalised(images) if hyper is None or not self.training else self.layer(images, hyper)
