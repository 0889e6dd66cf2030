"""digits-small with as many training as validation images: its 90 and 400, pooled and divided evenly.

    python -m stn_fast.compare benchmarks/even_split.py --methods stn,fixed,tpe --guesses low,middle,high

400 images to tune on are many for 90 to train on. This recipe shows what tuning brings where they are not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stn_fast.recipes import recipe
from stn_fast.training.config import Config

if TYPE_CHECKING:
    from stn_fast.training.task import Task

SPLIT_SEED = 0


def config() -> Config:
    """That of digits-small, with about as many training steps: 300 epochs of 5."""
    small = recipe("digits-small").config()
    schedule = replace(small.schedule, epochs=300)
    method = replace(small.method, warmup_epochs=12)
    return replace(small, recipe="digits-even-split", schedule=schedule, method=method)


def build(config: Config) -> Task:
    """The task of digits-small with the other split."""
    import torch

    from stn_fast.data import DataSet, Split

    task = recipe("digits-small").build(config)
    train, valid, test = task.data
    pooled = [torch.cat(parts) for parts in zip(train, valid, strict=True)]
    order = torch.randperm(len(pooled[0]), generator=torch.Generator().manual_seed(SPLIT_SEED))
    halves = order.tensor_split(2)
    train, valid = (Split(*(part[half] for part in pooled)) for half in halves)
    return replace(task, data=DataSet(train, valid, test))
