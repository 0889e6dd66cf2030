"""A network written with gated layers, which is called with the hyperparameters; `tuned` ones are called without."""

from itertools import pairwise

import torch
from torch import nn

from stn_fast.layers import HyperLinear, PerExampleDropout, PerExampleNoise


class GatedMLP(nn.Module):
    """Gated linear layers with ReLU between them, and the regularisers of `mlp` that the space names."""

    def __init__(self, space, sizes, response_rank=None):
        super().__init__()
        self.noise = PerExampleNoise("input_noise", stream=1) if "input_noise" in space else None
        names = ["input_dropout", *(f"hidden_dropout_{i}" for i in range(1, len(sizes) - 1))]
        self.dropouts = nn.ModuleList(
            PerExampleDropout(name, stream=stream) if name in space else nn.Identity()
            for stream, name in enumerate(names, start=2)
        )
        gated = dict(num_hyperparameters=len(space), response_rank=response_rank)
        self.layers = nn.ModuleList(HyperLinear(inputs, outputs, **gated) for inputs, outputs in pairwise(sizes))

    def forward(self, x, hyper):
        if self.noise is not None:
            x = self.noise(x, hyper)
        for i, (dropout, layer) in enumerate(zip(self.dropouts, self.layers, strict=True)):
            x = torch.relu(x) if i else x
            x = dropout(x, hyper) if isinstance(dropout, PerExampleDropout) else x
            x = layer(x, hyper)
        return x
