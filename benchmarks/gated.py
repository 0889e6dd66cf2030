"""AlexNet written with gated layers, whose forward pass takes the hyperparameters, for comparison with `convert`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import CHANNELS, FULLY_CONNECTED, POOLED, STRIDES
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers import HyperConv2d, HyperLinear, PerExampleDropout, PerExampleDropout2d

CONV_DROPOUTS = tuple(f"conv_dropout_{i}" for i in range(1, len(CHANNELS)))
FC_DROPOUTS = tuple(f"fc_dropout_{i}" for i in range(1, len(FULLY_CONNECTED) - 1))  # the last layer has none


class AlexNet(nn.Module):
    """3-64-192-384-256-256, then 1024-4096-4096-10, with full responses to n hyperparameters.

    Convolutions apply ReLU themselves. Dropout of whole channels, at the rates `CONV_DROPOUTS`, follows each of them,
    and dropout at the rates `FC_DROPOUTS` precedes each fully connected layer but the last.
    """

    def __init__(self, n: int):
        super().__init__()
        options: dict[str, Any] = dict(num_hyperparameters=n)
        filters = zip(pairwise(CHANNELS), STRIDES, strict=True)
        self.convolutions = nn.ModuleList(HyperConv2d(i, o, 3, s, 1, **options, relu=True) for (i, o), s in filters)
        self.layers = nn.ModuleList(HyperLinear(i, o, **options) for i, o in pairwise(FULLY_CONNECTED))
        self.dropouts = nn.ModuleDict()
        for stream, name in enumerate((*CONV_DROPOUTS, *FC_DROPOUTS), start=1):
            kind = PerExampleDropout2d if name in CONV_DROPOUTS else PerExampleDropout
            self.dropouts[name] = kind(name, stream=stream)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """Normalised images (B, 3, 32, 32) → logits (B, 10)."""
        for convolution, pooled, name in zip(self.convolutions, POOLED, CONV_DROPOUTS, strict=True):
            x = convolution(x, hyper)
            x = self.dropouts[name](F.max_pool2d(x, 2) if pooled else x, hyper)
        x = x.flatten(1)
        *hidden, last = self.layers
        for layer, name in zip(hidden, FC_DROPOUTS, strict=True):
            x = torch.relu(layer(self.dropouts[name](x, hyper), hyper))
        return last(x, hyper)
