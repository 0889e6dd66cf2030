"""The package's operations as functions, as in torch.nn.functional."""

from stn_fast.ops.augment import augment
from stn_fast.ops.dropout import dropout
from stn_fast.ops.gated_conv2d import gated_conv2d
from stn_fast.ops.gated_embedding import gated_embedding
from stn_fast.ops.gated_linear import gated_linear
from stn_fast.ops.gated_lstm import gated_lstm
from stn_fast.ops.gates import GatedParameters
from stn_fast.ops.noise import noise
from stn_fast.ops.perturb import perturb
from stn_fast.ops.weight_decay import weight_decay_penalty

__all__ = [
    "GatedParameters",
    "augment",
    "dropout",
    "gated_conv2d",
    "gated_embedding",
    "gated_linear",
    "gated_lstm",
    "noise",
    "perturb",
    "weight_decay_penalty",
]
