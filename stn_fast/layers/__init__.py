"""Drop-in modules, each called with its input and a batch of hyperparameters."""

from stn_fast.layers.augmentation import PerExampleAugmentation
from stn_fast.layers.batch_norm import HyperBatchNorm2d
from stn_fast.layers.conv import HyperConv2d
from stn_fast.layers.embedding import EmbeddingDropout, HyperEmbedding
from stn_fast.layers.linear import HyperLinear
from stn_fast.layers.lstm import HyperLSTM
from stn_fast.layers.regularisers import DropConnect, PerExampleDropout, PerExampleDropout2d, PerExampleNoise

__all__ = [
    "DropConnect",
    "EmbeddingDropout",
    "HyperBatchNorm2d",
    "HyperConv2d",
    "HyperEmbedding",
    "HyperLSTM",
    "HyperLinear",
    "PerExampleAugmentation",
    "PerExampleDropout",
    "PerExampleDropout2d",
    "PerExampleNoise",
]
