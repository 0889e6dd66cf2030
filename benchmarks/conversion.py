"""Steps of converted networks against those of the plain networks, and of a network of gated layers.

    python -m benchmarks.conversion --json benchmarks/results/conversion-cpu.json
    python -m benchmarks.conversion --networks alexnet --json benchmarks/results/conversion-gated-cpu.json

A step is perturbation, forward, backward, clipping and optimizer, with response_rank="auto". `converted` makes one pass
over the batch; `converted_antithetic` makes the two of `SelfTuner`'s default. `plain` trains the network as it was. The
networks are timm's ResNet-18 on images of 32 x 32, and GPT-2 of 6 layers of 384 units for 65 characters. Both libraries
must be installed. `gated` is AlexNet written with gated layers (`benchmarks.gated`), against the same plain network,
converted; both have full responses, and tune only dropout rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stn_fast as stn
from benchmarks import gated, plain, whole_steps
from benchmarks.timing import Clock, Provider
from benchmarks.whole_steps import Makers, steps_of
from stn_fast.command_line import run_command
from stn_fast.extras import require
from stn_fast.models.classifier import channels_last
from stn_fast.training.methods import SelfTuning, default_optimizer
from stn_fast.training.task import classification_loss

MODES = ("train", "valid")
PROVIDERS = ("converted", "converted_antithetic", "plain", "gated")
CLIP = 1.0
SHAPES = {"resnet18": (64, 3, 32, 32), "gpt2": (4, 128), "alexnet": (128, 3, 32, 32)}
CHARACTERS = 65
RESNET18: dict[str, Any] = dict(num_classes=10)
GPT2: dict[str, Any] = dict(n_layer=6, n_head=6, n_embd=384, n_positions=128)


class Logits(nn.Module):
    """A model of transformers whose output is only its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def resnet18() -> nn.Module:
    model: nn.Module = import_module("timm").create_model("resnet18", **RESNET18)
    return model


def gpt2() -> nn.Module:
    transformers = import_module("transformers")
    config = transformers.GPT2Config(**GPT2, vocab_size=CHARACTERS, bos_token_id=None, eos_token_id=None)
    return Logits(transformers.GPT2LMHeadModel(config))


def resnet18_batch() -> tuple[Tensor, Tensor]:
    shape = SHAPES["resnet18"]
    return torch.randn(shape).contiguous(memory_format=torch.channels_last), torch.randint(10, shape[:1])


def gpt2_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(CHARACTERS, SHAPES["gpt2"])
    return tokens, tokens.roll(-1, 1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "resnet18": (resnet18, resnet18_batch),
    "gpt2": (gpt2, gpt2_batch),
}


LIBRARIES = {"resnet18": "timm", "gpt2": "transformers"}


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def makers(name: str, mode: str, device: torch.device) -> Makers:
    """The steps of one network, each on a copy of it, on one batch."""
    make, make_batch = NETWORKS[name]
    torch.manual_seed(0)
    batch = tuple(part.to(device) for part in make_batch())

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = make().to(device)
        return model.to(memory_format=torch.channels_last) if name == "resnet18" else model  # type: ignore[call-overload]

    def of_plain() -> Provider:
        training = plain.Training(made(), default_optimizer, CLIP)
        return steps_of("train", lambda: training.step(*batch), None)

    def converted(antithetic: bool) -> Provider:
        model = stn.convert(made(), quiet=True)
        options: dict[str, Any] = dict(clip=CLIP, antithetic=antithetic)
        tuner = stn.SelfTuner(model, default_optimizer(list(model.parameters())), loss, **options)
        return steps_of(mode, lambda: tuner.train_step(batch), lambda: tuner.valid_step(batch))

    found: Makers = {"plain": of_plain, "converted": lambda: converted(False)}
    return {**found, "converted_antithetic": lambda: converted(True)} if mode == "train" else found


def dropout_rates() -> stn.HyperparameterSpace:
    """A rate for each place with dropout of AlexNet."""
    rate: dict[str, Any] = dict(low=0.0, high=0.9, init=plain.RATE)
    names = (*gated.CONV_DROPOUTS, *gated.FC_DROPOUTS)
    return stn.HyperparameterSpace([stn.Hyperparameter(name, **rate) for name in names])


def converted_alexnet(space: stn.HyperparameterSpace) -> nn.Module:
    """The plain AlexNet, converted with `dropout_rates`."""
    model = plain.alexnet()
    places = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
    rates = dict(zip(places, space.names, strict=True))
    return stn.convert(model, space, dropouts=rates, response_rank=None, quiet=True)


def alexnet_makers(mode: str, device: torch.device) -> Makers:
    """The network of gated layers, and the plain one, converted; both through `SelfTuning`, with one pass."""
    space = dropout_rates()
    images = channels_last(torch.randn(SHAPES["alexnet"])).to(device)
    batch = images, torch.randint(10, (len(images),)).to(device)

    def steps(model: nn.Module) -> Provider:
        losses, count = (classification_loss, classification_loss), iter(range(10**9))
        method = SelfTuning(model.to(device), space, *losses, clip=CLIP, antithetic=False)
        train, valid = (lambda: method.train_step(batch, next(count))), (lambda: method.valid_step(batch, next(count)))
        return steps_of(mode, train, valid)

    return {
        "gated": lambda: steps(gated.AlexNet(len(space))),
        "converted": lambda: steps(converted_alexnet(space)),
    }


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__.splitlines()[0])
    whole_steps.add_options(parser, MODES, PROVIDERS)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, "alexnet"], default=list(NETWORKS))
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[str, str, Sequence[int], Makers]]:
        for name in options.networks:
            for mode in options.modes:
                device = torch.device(options.device)
                made = makers(name, mode, device) if name in NETWORKS else alexnet_makers(mode, device)
                yield name, mode, SHAPES[name], made

    for name in options.networks:
        if name in LIBRARIES:
            require(LIBRARIES[name])
    options.providers = options.providers or list(PROVIDERS)
    return whole_steps.measure("conversion", cases(), options, clock, ("gated",))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
