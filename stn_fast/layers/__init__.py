"""Drop-in modules: each is called with its input and the batch of hyperparameters."""

from stn_fast.layers.augmentation import PerExampleAugmentation
from stn_fast.layers.batch_norm import HyperBatchNorm2d
from stn_fast.layers.conv import HyperConv2d
from stn_fast.layers.linear import HyperLinear
from stn_fast.layers.regularisers import PerExampleDropout, PerExampleDropout2d, PerExampleNoise

__all__ = [
    "HyperBatchNorm2d",
    "HyperConv2d",
    "HyperLinear",
    "PerExampleAugmentation",
    "PerExampleDropout",
    "PerExampleDropout2d",
    "PerExampleNoise",
]
