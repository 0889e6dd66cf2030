"""Small networks of every kind and batches for them, to take whole steps with."""

import sys
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from random_response import respond

import stn_fast as stn
from stn_fast.data import Split, digits
from stn_fast.models import ImageClassifier, LanguageModel, alexnet, mlp, tuned
from stn_fast.training.batches import Batches
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.methods import SelfTuning
from stn_fast.training.streams import Streams
from stn_fast.training.task import classification_loss, decayed_classification_loss


@dataclass
class Steps:
    """A method, its batches, and what the weights' optimizer descends with."""

    method: SelfTuning
    train: object
    valid: object


def _rate(name, **options):
    return stn.Hyperparameter(name, low=0.0, high=0.9, init=0.2, **options)


def _positive(name, init, **options):
    return stn.Hyperparameter(name, low=0.0, init=init, **options)


def _finished(model, space, objectives, train, valid, device, dtype, options):
    torch.manual_seed(1)
    respond(model)
    make = options.pop("make", SelfTuning)
    method = make(model.to(device, dtype), space, *objectives, seed=3, **options)
    return Steps(method, train, valid)


def digits_steps(device="cpu", dtype=torch.float32, **options):
    """The network of the recipe, half as wide, of gated layers, with all of its hyperparameters."""
    space = stn.HyperparameterSpace(
        [
            *(_rate(name) for name in ("input_dropout", "hidden_dropout_1", "hidden_dropout_2")),
            _positive("input_noise", 0.1),
            _positive("weight_decay", 1e-3),
        ]
    )
    torch.manual_seed(0)
    model = mlp(space, (64, 128, 128, 10))
    data = digits.load()
    train, valid = (Split(part.inputs.to(device, dtype), part.targets.to(device)) for part in data[:2])
    batches = (Batches(part, 50, seed=0, stream=stream) for stream, part in enumerate((train, valid)))
    objectives = decayed_classification_loss, classification_loss
    return _finished(model, space, objectives, *batches, device, dtype, options)


def alexnet_steps(device="cpu", dtype=torch.float32, **options):
    """AlexNet with a few channels, augmentation and dropout."""
    names = ("conv_dropout_1", "conv_dropout_5", "fc_dropout_1", "fc_dropout_2")
    space = stn.HyperparameterSpace(
        [*map(_rate, names), _positive("weight_decay", 1e-3), _positive("input_scale", 0.1)]
    )
    torch.manual_seed(0)
    with mock.patch.multiple(sys.modules[alexnet.__module__], CHANNELS=(16, 32, 32, 32, 16), HIDDEN=(64, 64)):
        network = alexnet()
    model = tuned(ImageClassifier(space, network, mean=(0.5,) * 3, std=(0.25,) * 3, flip=0.5), space)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images.to(device), torch.randint(10, (40,), generator=generator).to(device))
    batches = (Batches(split, 16, seed=0, stream=stream) for stream in range(2))
    objectives = decayed_classification_loss, classification_loss
    return _finished(model, space, objectives, *batches, device, dtype, options)


def language_steps(device="cpu", dtype=torch.float32, **options):
    """The language model with all of its regularisers; the state goes from window to window."""
    of_batch = dict(per_example=False)
    space = stn.HyperparameterSpace(
        [
            *(_rate(name) for name in ("output_dropout", "input_dropout", "hidden_dropout")),
            *(_rate(name, **of_batch) for name in ("embedding_dropout", "recurrent_dropout")),
            _positive("activation_regularization", 0.1, **of_batch),
            _positive("temporal_activation_regularization", 0.1, **of_batch),
        ]
    )
    torch.manual_seed(0)
    model = tuned(LanguageModel(words=60, embedding=32, hidden=32), space)
    text = torch.randint(60, (700,), generator=torch.Generator().manual_seed(0)).to(device)
    streams = (Streams(Split(text[:-1], text[1:]), 8, 7, seed=0, stream=stream) for stream in range(2))
    objectives = regularised_next_word_loss, next_word_loss
    return _finished(model, space, objectives, *streams, device, dtype, options)


TASKS = {"digits": digits_steps, "alexnet": alexnet_steps, "language model": language_steps}
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True)
OPTIMIZERS = {
    "sgd, adam": {},
    "adam, rmsprop": dict(
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True), hyper_optimizer=partial(torch.optim.RMSprop, lr=1e-2)
    ),
}


def cycle(steps, count, take=None):
    """Two training steps and a validation step in turns, ``count`` in all; the losses."""
    take = take or steps.method
    losses, trained, tuned = [], 0, 0
    for step in range(count):
        if step % 3 < 2:
            losses.append(take.train_step(steps.train[trained], step))
            trained += 1
        else:
            losses.append(take.valid_step(steps.valid[tuned], step))
            tuned += 1
    steps.method.check_finite()
    return losses
