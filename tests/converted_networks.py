"""Small plain networks of several kinds, and their inputs, to be converted by tests."""

import torch
import torch.nn.functional as F
from numerics import relative_error
from random_response import respond
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted

WORDS = 11


class Block(nn.Module):
    """A transformer's feed-forward block on embedded tokens, with position numbers (1, T)."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.embed, self.positions = nn.Embedding(WORDS, 6, padding_idx=0), nn.Embedding(5, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.drop = nn.Dropout(rate)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1])[None])
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Text(nn.Module):
    """A language model whose decoder is tied to its embedding."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.lstm = nn.LSTM(6, 6, 2, batch_first=True, dropout=rate)
        self.decoder = nn.Linear(6, WORDS)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens):
        return self.decoder(self.lstm(self.embed(tokens))[0])


class Norms(nn.Module):
    """Group norm on images, RMS norm and a norm over two dimensions behind it."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.conv, self.group = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4)
        self.drop, self.rms, self.layer = nn.Dropout2d(rate), nn.RMSNorm(5), nn.LayerNorm((5, 5), bias=False)

    def forward(self, images):
        return self.layer(self.rms(self.drop(self.group(self.conv(images)))))


def signals(rate=0.0):
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular", groups=2),
        nn.Dropout1d(rate),
        nn.Unflatten(2, (3, 5, 1)),
        nn.Conv3d(4, 4, (2, 3, 1), stride=(1, 2, 1), bias=False),
    )


def cnn(rate=0.0):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),  # batch norm has the bias
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(rate),
        nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(36),
        nn.Dropout(rate),
        nn.Linear(36, 3),
    )


NETWORKS = {"cnn": cnn, "block": Block, "text": Text, "norms": Norms, "signals": signals}


def plain(kind, rate=0.0):
    """A network in float64 whose norms are not the identity."""
    torch.manual_seed(0)
    model = NETWORKS[kind](rate).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "layer" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind, examples=4):
    generator = torch.Generator().manual_seed(1)
    if kind in ("block", "text"):
        return torch.randint(WORDS, (examples, 5), generator=generator)
    shape = (2, 15) if kind == "signals" else (2, 5, 5)
    return torch.randn(examples, *shape, generator=generator, dtype=torch.float64)


def converted(model, **options):
    """``stn.convert(model)`` with a response other than 0, a λ other than the first, and wide perturbations."""
    torch.manual_seed(2)
    tuned = respond(stn.convert(model, quiet=True, **options))
    with torch.no_grad():
        for module in tuned.modules():
            if isinstance(module, Converted) and getattr(module, "padding_idx", None) is not None:
                table = module.response_weight if module.response_projection is None else module.response_projection
                table[module.padding_idx].zero_()
        tuned.tuned_hyperparameters.location.add_(0.3)
        tuned.tuned_hyperparameters.raw_scale.fill_(1.0)
    return tuned


def sampled(tuned, examples=4, step=0, location=None):
    own = tuned.tuned_hyperparameters
    location = own.location if location is None else location
    return own.space.sample(location, own.raw_scale, batch_size=examples, seed=0, step=step)


def assert_descends(tuned, batch, location, wanted):
    """That an unperturbed validation step at rate 1 moves from the location by the gradient that is wanted."""
    tuner = stn.SelfTuner(
        tuned, torch.optim.SGD(tuned.parameters(), 1.0), F.cross_entropy, tune_scales=False,
        hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, 1.0))  # fmt: skip
    tuner.valid_step(batch)
    assert wanted.all()
    assert relative_error(location.detach() - tuned.tuned_hyperparameters.location, wanted) < 1e-5
