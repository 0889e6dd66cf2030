"""A fixture for tests of what layers compute: with R = 0, as they start, a wrong response would not show."""

import pytest
import torch
from torch import nn

from stn_fast.layers import HyperBatchNorm2d, HyperConv2d, HyperEmbedding, HyperLinear, HyperLSTM
from stn_fast.training.parameters import is_gate, is_response


def respond(model):
    """Draws R and r (A, with a low rank) of the size of W, and leaves the rest as it is; returns ``model``."""
    for name, parameter in model.named_parameters():
        if is_response(name) and not is_gate(name) and "response_projection" not in name:
            nn.init.uniform_(parameter, -1 / parameter[0].numel() ** 0.5, 1 / parameter[0].numel() ** 0.5)
    return model


def _responding(made):
    def reset_parameters(layer):
        made(layer)
        respond(layer)
        if getattr(layer, "padding_idx", None) is not None:
            with torch.no_grad():
                layer._response_table[layer.padding_idx].zero_()

    return reset_parameters


@pytest.fixture
def random_response(monkeypatch):
    """Layers that are made in the test start with a response other than 0."""
    for kind in (HyperBatchNorm2d, HyperConv2d, HyperEmbedding, HyperLinear, HyperLSTM):
        monkeypatch.setattr(kind, "reset_parameters", _responding(kind.reset_parameters))
