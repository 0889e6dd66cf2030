"""What the convolutional networks without shortcuts share: numbered layers, then fully connected ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from stn_fast.models.mlp import fully_connected


def convnet(layers: Sequence[Sequence[nn.Module]], pooled: Sequence[bool], sizes: Sequence[int]) -> nn.Sequential:
    """Convolutions, then fully connected layers: normalised images (B, C, H, W) → logits (B, sizes[-1]).

    The modules of convolution i are followed by max-pooling by 2 if it is ``pooled``, and by `conv_dropout_i`, which
    drops whole channels. `fc_dropout_1`, `fc_dropout_2`, … drop inputs of the fully connected layers, and
    `last_dropout` those of the last. All dropout has rate 0.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (layer, pool) in enumerate(zip(layers, pooled, strict=True), start=1):
        modules[f"conv_{number}"] = layer[0] if len(layer) == 1 else nn.Sequential(*layer)
        if pool:
            modules[f"pool_{number}"] = nn.MaxPool2d(2)
        modules[f"conv_dropout_{number}"] = nn.Dropout2d(0.0)
    dropouts = [*(f"fc_dropout_{i}" for i in range(1, len(sizes) - 1)), "last_dropout"]
    return nn.Sequential(OrderedDict(**modules, flatten=nn.Flatten(), **fully_connected(sizes, dropouts)))
