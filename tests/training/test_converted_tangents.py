"""Tangents of converted networks, for Δ-STN: the closed forms are those of torch.func on the definitions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from converted_networks import NETWORKS, converted, inputs, plain
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stn_fast.dispatch import use_backend
from stn_fast.training.linearised import Linearised
from stn_fast.training.parameters import hold_parameters, is_response

EXAMPLES = 5


class ConvNet(nn.Module):
    """Convolutions of the frames of a film, several rows per example, and both kinds of norm."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, (3, 2), padding=1), nn.BatchNorm2d(4)
        self.narrow, self.layer = nn.Conv2d(4, 3, 2, stride=2, bias=False), nn.LayerNorm((3, 3))
        self.drop, self.head = nn.Dropout(rate), nn.Linear(27, 7)

    def forward(self, films):
        x = self.norm(self.conv(films.flatten(0, 1))).relu()
        x = self.layer(self.narrow(x)).flatten(1)
        return self.head(self.drop(F.gelu(x))).unflatten(0, films.shape[:2]).mean(1)


class Volumes(nn.Module):
    """A batch norm of (N, C, D, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Linear(4 * 2 * 4, 7)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.conv(x))).mean(3).flatten(1))


class Transformer(nn.Module):
    """Two blocks with scaled_dot_product_attention."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(6, 18, bias=False) for _ in range(2))
        self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(2)) for sizes in ((6, 6), (6, 11), (11, 6))
        )
        self.drop = nn.ModuleList(nn.Dropout(rate) for _ in range(4))

    def forward(self, x):
        for i in range(2):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=i == 0).transpose(1, 2).flatten(2)
            x = x + self.drop[2 * i](self.out[i](attended))
            x = x + self.drop[2 * i + 1](self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x)))))
        return x


class Encoder(nn.Module):
    """torch's own transformer layer, with MultiheadAttention."""

    def __init__(self, rate=0.4):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 9, dropout=rate, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer(x))


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(6, 5, 2, batch_first=True, dropout=0.4), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0])


def network_and_inputs(kind, rank):
    if kind in NETWORKS:
        return converted(plain(kind, 0.4), response_rank=rank), inputs(kind, EXAMPLES)
    torch.manual_seed(0)
    shape = {ConvNet: (3, 2, 6, 5), Volumes: (2, 3, 4, 5)}.get(kind, (7, 6))
    model = converted(kind().double(), response_rank=rank)
    return model, torch.randn(EXAMPLES, *shape, dtype=torch.float64)


def perturbed(tuned, step=3):
    own = tuned.tuned_hyperparameters
    return own.space.sample(
        own.location, own.raw_scale, batch_size=EXAMPLES, seed=1, step=step, center=own.location.clone()
    )


def response_gradients(model, outputs):
    """Of a loss that is not linear in the outputs, by name."""
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    named = {name: p for name, p in model.named_parameters() if is_response(name)}
    return dict(zip(named, torch.autograd.grad((outputs * weights).square().sum(), named.values()), strict=True))


def by_torch_func(model, x, hyper):
    """f(0) + J h by torch.func.jvp through the definitions of all operations."""

    def outputs(response):
        with model.tuned_hyperparameters.using(replace(hyper, response=response, calls={}, open_calls={})):
            return torch.func.functional_call(model, dict(model.named_parameters()), (x,))

    with use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        z, dz = torch.func.jvp(outputs, (torch.zeros_like(hyper.response),), (hyper.response,))
    return z + dz


@pytest.mark.parametrize("rank", [None, 1], ids=["full", "rank 1"])
@pytest.mark.parametrize("kind", [*NETWORKS, ConvNet, Volumes, Transformer, Encoder, Recurrent])
def test_outputs_and_response_gradients_are_those_of_torch_func(kind, rank):
    model, x = network_and_inputs(kind, rank)
    hyper = perturbed(model)
    with hold_parameters([p for name, p in model.named_parameters() if not is_response(name)]):
        with model.tuned_hyperparameters.using(hyper):
            found = Linearised(model)(x)
        expected = by_torch_func(model, x, hyper)
        pairs = {"outputs": (found, expected)}
        theirs = response_gradients(model, expected)
        pairs |= {name: (mine, theirs[name]) for name, mine in response_gradients(model, found).items()}
    for name, (mine, other) in pairs.items():
        assert (mine - other).norm() < 1e-12 * other.norm(), name
        assert other.norm() > 0, name


@pytest.mark.parametrize("kind", ["cnn", ConvNet, Transformer])
def test_tangents_of_converted_layers_have_the_closed_form(kind, monkeypatch):
    """Not that of forward-mode AD through the definition, which computes R ȧ for nothing."""
    model, x = network_and_inputs(kind, None)
    for name in ("gated_linear", "gated_conv2d"):
        monkeypatch.setattr(f"stn_fast.ops.{name}.reference", None)
    with model.tuned_hyperparameters.using(perturbed(model)):
        Linearised(model)(x)
