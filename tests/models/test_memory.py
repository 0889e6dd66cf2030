"""Training a network holds as much memory after a step as before it."""

import gc

import torch
from torch.profiler import ProfilerActivity, profile

from stn_fast.data import Split
from stn_fast.models import ImageClassifier, alexnet
from stn_fast.recipes import cifar10
from stn_fast.training.methods import SelfTuning
from stn_fast.training.spaces import build_space
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
    space = build_space(cifar10.config())
    model = ImageClassifier(space, alexnet(space), mean=(0.5,) * 3, std=(0.25,) * 3, image_size=32)
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


def test_what_is_kept_would_show():
    kept = []
    assert kept_bytes(lambda: kept.append(torch.ones(1000))) == 4000
