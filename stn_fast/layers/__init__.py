"""Drop-in modules: each is called with its input and the batch of hyperparameters."""

from stn_fast.layers.augmentation import PerExampleAugmentation
from stn_fast.layers.linear import HyperLinear
from stn_fast.layers.regularisers import PerExampleDropout, PerExampleNoise

__all__ = ["HyperLinear", "PerExampleAugmentation", "PerExampleDropout", "PerExampleNoise"]
