"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, included in scikit-learn, without any download."""

import numpy as np
import torch

from stn_fast.data.splits import DataSet, Split, checked
from stn_fast.extras import extra

SIZES = (900, 400, 497)
PIXEL_MAX = 16.0
SHUFFLE_SEED = 0


def load() -> DataSet:
    """900 training, 400 validation and 497 test images from one fixed shuffle, the same for every run.

    Inputs are (N, 64) float32, pixels scaled to [0, 1]; targets (N,) int64, the digit.

    Raises:
        UserError: scikit-learn is missing, or a pixel is not finite.
    """
    with extra("scikit-learn"):
        from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(digits))
    inputs = torch.from_numpy(pixels[order] / PIXEL_MAX).float()
    targets = torch.from_numpy(digits[order]).long()
    splits = zip(inputs.split(SIZES), targets.split(SIZES), strict=True)
    return checked(DataSet(*(Split(*split) for split in splits)))
