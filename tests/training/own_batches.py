"""A batch that is neither a Split nor a Window: it keeps the sum of the losses so far."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stn_fast.data import Split
from stn_fast.training.batches import IndependentExamples
from stn_fast.training.task import classification_loss, classification_scores


@dataclass
class Sum:
    """What a batch leaves for the next."""

    value: Tensor = field(default_factory=lambda: torch.zeros(()))
    undone: int = 0


@dataclass
class Summing:
    """A `stn_fast.training.batches.Batch` of a Split."""

    inputs: Tensor
    targets: Tensor
    kept: Sum
    begins: bool = False

    @property
    def examples(self) -> int:
        return len(self.targets)

    def finish(self, outcome: Any) -> Any:
        result, value = outcome
        self.kept.value = value.detach()
        return result

    def undo(self, where: Tensor | None) -> None:
        self.kept.undone += 1
        self.kept.value = self.kept.value * (0 if where is None else ~where)

    def parts(self) -> Any:
        return self.inputs, self.targets, self.kept.value

    def like(self, parts: Any) -> "Summing":
        inputs, targets, value = parts
        return Summing(inputs, targets, Sum(value))

    def finish_as(self, other: Any) -> None:
        self.kept.value = other.kept.value.clone()


def summed_loss(model, batch, hyper):
    loss = classification_loss(model, Split(batch.inputs, batch.targets), hyper)
    return loss, batch.kept.value + loss


class SummingExamples(IndependentExamples):
    """Evaluates in such batches."""

    def __init__(self):
        self.kept = Sum()

    def whole(self, split, size, *, test, device=None):
        for inputs, targets in super().whole(split, size, test=test, device=device):
            yield Summing(inputs, targets, self.kept)

    def scores(self, model, batch, hyper):
        found = classification_scores(model, Split(batch.inputs, batch.targets), hyper)
        return found, batch.kept.value + found["loss"]
