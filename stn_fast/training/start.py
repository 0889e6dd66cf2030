"""The start of the response that the papers describe. Layers are made with another one, see `GatedLayer`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stn_fast.conversion.converted import Converted
from stn_fast.layers.embedding import GatedTable
from stn_fast.layers.gated import GatedLayer
from stn_fast.layers.lstm import HyperLSTM
from stn_fast.training.parameters import is_gate

ROLES = ("response_weight", "weight_gate", "response_bias", "bias_gate", "response_projection")  # in the order of draws
APART = 0x5EED  # changes the seed, so that R is not drawn from the numbers that W was; torch reads its low 32 bits


@torch.no_grad()
def start_as_published(model: nn.Module, seed: int, gates: float = 0.01) -> None:
    """Draws the responses of gated and converted layers as the papers do, the same on every device.

    R and r are uniform like W and b, and the gates N(0, gates²): 0.01 for STN (MacKay et al. 2019), 0 for Δ-STN (Bae
    and Grosse 2020). With a low rank, B is uniform like W, and A is uniform such that the entries of R = A B have the
    variance of a full response.
    """
    generator = torch.Generator().manual_seed(seed ^ APART)
    for layer in model.modules():
        if isinstance(layer, GatedLayer | HyperLSTM | Converted):
            _start(layer, generator, gates)


def _start(layer: GatedLayer | HyperLSTM | Converted, generator: torch.Generator, gates: float) -> None:
    def uniform(parameter: Tensor, bound: float) -> None:
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    own = dict(layer.named_parameters(recurse=False))
    for weight in [name for name in own if name.startswith("response_weight")]:
        ending = weight.removeprefix("response_weight")
        bound = layer.response_bounds.get(ending, 1.0) if isinstance(layer, Converted) else layer.bound
        projection = own.get(f"response_projection{ending}")
        parts = [(role, own[f"{role}{ending}"]) for role in ROLES if f"{role}{ending}" in own]
        for role, parameter in parts:
            if is_gate(role):
                parameter.copy_(torch.empty(parameter.shape).normal_(std=gates, generator=generator))
            elif role == "response_weight" and projection is not None:
                uniform(parameter, math.sqrt(3 / parameter.shape[1]))
            else:
                uniform(parameter, bound)
    padding = getattr(layer, "padding_idx", None)
    if isinstance(layer, GatedTable) and isinstance(padding, int):
        layer._response_table[padding].zero_()
