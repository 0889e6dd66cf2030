"""The start of the response that the papers describe. Layers are made with another one, see `GatedLayer`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stn_fast.layers.embedding import HyperEmbedding
from stn_fast.layers.gated import GatedLayer
from stn_fast.layers.lstm import HyperLSTM
from stn_fast.training.parameters import is_gate, is_response

APART = 0x5EED  # changes the seed, so that R is not drawn from the numbers that W was; torch reads its low 32 bits


@torch.no_grad()
def start_as_published(model: nn.Module, seed: int, gates: float = 0.01) -> None:
    """Draws the responses of this package's layers as the papers do, the same on every device.

    R and r are uniform like W and b, and the gates N(0, gates²): 0.01 for STN (MacKay et al. 2019), 0 for Δ-STN (Bae
    and Grosse 2020). With a low rank, B is uniform like W, and A is uniform such that the entries of R = A B have the
    variance of a full response.
    """
    generator = torch.Generator().manual_seed(seed ^ APART)
    for layer in model.modules():
        if isinstance(layer, GatedLayer | HyperLSTM):
            _start(layer, generator, gates)


def _start(layer: GatedLayer | HyperLSTM, generator: torch.Generator, gates: float) -> None:
    def uniform(parameter: Tensor, bound: float) -> None:
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    for name, parameter in layer.named_parameters(recurse=False):
        if is_gate(name):
            parameter.copy_(torch.empty(parameter.shape).normal_(std=gates, generator=generator))
        elif name.startswith("response_weight") and hasattr(layer, projection := name.replace("weight", "projection")):
            low_rank = getattr(layer, projection) is not None
            uniform(parameter, math.sqrt(3 / parameter.shape[1]) if low_rank else layer.bound)
        elif is_response(name):
            uniform(parameter, layer.bound)
    if isinstance(layer, HyperEmbedding) and layer.padding_idx is not None:
        layer._response_table[layer.padding_idx].zero_()
