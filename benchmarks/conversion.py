"""Steps of converted networks against those of the plain networks, and of a network of gated layers.

    python -m benchmarks.conversion --json benchmarks/results/conversion-cpu.json
    python -m benchmarks.conversion --networks alexnet own-resnet18 language \\
        --json benchmarks/results/conversion-gated-cpu.json

A step is perturbation, forward, backward, clipping and optimizer, with response_rank="auto". `converted` makes one pass
over the batch; `converted_antithetic` makes the two of `SelfTuner`'s default. `plain` trains the network as it was. By
default, networks are timm's ResNet-18 on images of 32 x 32 (`resnet18`), and GPT-2 of 6 layers of 384 units for 65
characters (`gpt2`). Both libraries must be installed.

Other networks are compared with the same ones written with gated layers (`benchmarks.gated`), which are the provider
`gated`; both have full responses. They are AlexNet (`alexnet`) and the package's ResNet-18 (`own-resnet18`), for which
only dropout rates are tuned, and the language model of the recipe ptb-small, an LSTM of 2 x 200, with its seven
hyperparameters (`language`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import count, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stn_fast as stn
from benchmarks import gated, language_steps, plain, whole_steps
from benchmarks.timing import Clock, Provider
from benchmarks.whole_steps import Makers, steps_of
from stn_fast.command_line import run_command
from stn_fast.data import Split
from stn_fast.data.text import predictions
from stn_fast.extras import require
from stn_fast.models import LanguageModel, resnet, tuned
from stn_fast.models.classifier import channels_last
from stn_fast.recipes import recipe
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.methods import SelfTuning, default_optimizer
from stn_fast.training.spaces import build_space
from stn_fast.training.streams import Streams, Window
from stn_fast.training.task import Objective, classification_loss

MODES = ("train", "valid")
PROVIDERS = ("converted", "converted_antithetic", "plain", "gated")
CLIP = 1.0
SHAPES = {
    "resnet18": (64, 3, 32, 32),
    "gpt2": (4, 128),
    "alexnet": (128, 3, 32, 32),
    "own-resnet18": (16, 3, 32, 32),
    "language": language_steps.SHAPES["ptb-small"],
}
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


class Pair(NamedTuple):
    """A network of gated layers and the same one converted, with the same hyperparameters, losses and batches.

    ``losses`` are the training and the validation objective. ``batches`` makes an endless sequence of batches.
    """

    space: stn.HyperparameterSpace
    gated: Callable[[], nn.Module]
    converted: Callable[[], nn.Module]
    losses: tuple[Objective, Objective]
    batches: Callable[[torch.device], Iterator[Any]]


def alexnet() -> Pair:
    """With filters in channels_last, as `plain.alexnet`, which is converted, has them."""
    space = rates(*gated.CONV_DROPOUTS, *gated.FC_DROPOUTS)

    def of_gated_layers() -> nn.Module:
        model = gated.AlexNet(len(space))
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def converted() -> nn.Module:
        model = plain.alexnet()
        places = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
        dropouts = dict(zip(places, space.names, strict=True))
        return stn.convert(model, space, dropouts=dropouts, response_rank=None, quiet=True)

    return Pair(space, of_gated_layers, converted, CLASSIFICATION, partial(images, "alexnet"))


def own_resnet18() -> Pair:
    space = rates(*gated.BLOCK_DROPOUTS, gated.LAST_DROPOUT)
    networks = (lambda: gated.ResNet18(len(space))), (lambda: tuned(resnet.resnet18(), space))
    return Pair(space, *networks, CLASSIFICATION, partial(images, "own-resnet18"))


def language_model() -> Pair:
    space = build_space(recipe("ptb-small").config())
    window, batch, width, words = SHAPES["language"]

    def windows(device: torch.device) -> Iterator[Window]:
        text = predictions(torch.randint(words, (language_steps.WINDOWS * window * batch + 1,)), 0)
        streams = Streams(Split(*text), batch, window, seed=0, stream=0, device=device)
        return (streams[index] for index in count())

    return Pair(
        space,
        lambda: gated.LanguageModel(words, width, language_steps.LAYERS, len(space)),
        lambda: tuned(LanguageModel(words, width, width, language_steps.LAYERS), space),
        (regularised_next_word_loss, next_word_loss),
        windows,
    )


def rates(*names: str) -> stn.HyperparameterSpace:
    return stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, high=0.9, init=plain.RATE) for name in names])


def images(name: str, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same images and labels, again and again."""
    shape = SHAPES[name]
    return repeat((channels_last(torch.randn(shape)).to(device), torch.randint(10, shape[:1]).to(device)))


CLASSIFICATION = classification_loss, classification_loss
PAIRS = {"alexnet": alexnet, "own-resnet18": own_resnet18, "language": language_model}


def makers_of_pair(name: str, mode: str, device: torch.device) -> Makers:
    """The steps of the network of gated layers, and of the converted one; both through `SelfTuning`, with one pass."""
    pair = PAIRS[name]()

    def steps(make: Callable[[], nn.Module]) -> Provider:
        torch.manual_seed(0)
        batches, number = pair.batches(device), count()
        method = SelfTuning(make().to(device), pair.space, *pair.losses, clip=CLIP, antithetic=False)
        train, valid = (
            partial(lambda take: take(next(batches), next(number)), take)
            for take in (method.train_step, method.valid_step)
        )
        return steps_of(mode, train, valid)

    return {"gated": lambda: steps(pair.gated), "converted": lambda: steps(pair.converted)}


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__.splitlines()[0])
    whole_steps.add_options(parser, MODES, PROVIDERS)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, *PAIRS], default=list(NETWORKS))
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[str, str, Sequence[int], Makers]]:
        for name in options.networks:
            for mode in options.modes:
                device = torch.device(options.device)
                yield name, mode, SHAPES[name], (makers if name in NETWORKS else makers_of_pair)(name, mode, device)

    for name in options.networks:
        if name in LIBRARIES:
            require(LIBRARIES[name])
    options.providers = options.providers or list(PROVIDERS)
    return whole_steps.measure("conversion", cases(), options, clock, ("gated",))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
