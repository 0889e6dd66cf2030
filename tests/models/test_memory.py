"""Training a network holds as much memory after a step as before it."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from stn_fast.data import Split
from stn_fast.data.text import predictions
from stn_fast.models import ImageClassifier, LanguageModel, alexnet, tuned
from stn_fast.recipes import recipe
from stn_fast.training.language import next_word_loss, regularised_next_word_loss
from stn_fast.training.methods import SelfTuning
from stn_fast.training.spaces import build_space
from stn_fast.training.streams import Streams
from stn_fast.training.task import classification_loss, decayed_classification_loss

BATCH = 4


def kept_bytes(work) -> int:
    """What ``work`` allocates from torch and does not give back, in bytes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def test_alexnet_keeps_nothing_from_step_to_step():
    space = build_space(recipe("cifar10").config())
    model = tuned(ImageClassifier(space, alexnet(), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32), space)
    method = SelfTuning(model, space, decayed_classification_loss, classification_loss)
    batch = Split(torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (BATCH,)))
    steps = iter(range(100))

    def cycle():
        method.train_step(batch, next(steps))
        method.train_step(batch, next(steps))
        method.valid_step(batch, next(steps))
        for tensor in (*model.parameters(), *method.tuned):
            tensor.grad = None  # a gradient from before the count would be given back without being counted

    cycle()  # momentum and Adam's moments stay from here on
    assert kept_bytes(lambda: [cycle() for _ in range(2)]) == 0


def test_a_language_model_keeps_nothing_from_step_to_step():
    space = build_space(recipe("ptb").config())
    model = tuned(LanguageModel(50, 8, 8), space)
    method = SelfTuning(model, space, regularised_next_word_loss, next_word_loss, tune_scales=False, clip=0.25)
    text = predictions(torch.arange(2000) % 50, 0)
    train, valid = (Streams(text, BATCH, 9, seed=0, stream=stream) for stream in range(2))
    counts = [iter(range(100)) for _ in range(3)]

    def cycle():
        steps, trained, validated = counts
        method.train_step(train[next(trained)], next(steps))
        method.train_step(train[next(trained)], next(steps))
        method.valid_step(valid[next(validated)], next(steps))
        for tensor in (*method.model.parameters(), *method.tuned):
            tensor.grad = None

    kept_bytes(cycle)  # Adam's moments stay, and the states of both texts, which the next ones take the place of
    assert kept_bytes(lambda: [cycle() for _ in range(3)]) == 0


def test_the_test_detects_memory_that_is_kept():
    kept = []
    assert kept_bytes(lambda: kept.append(torch.ones(1000))) == 4000
