"""A step in parts: each computes the gradients of some examples of the batch, and their sum is that of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stn_fast.errors import UserError
from stn_fast.training.batches import Batch, shares


class Part(NamedTuple):
    """Some examples of a batch: ``first`` is the place of the first of them, ``weight`` their fraction of the batch."""

    batch: Batch
    first: int
    weight: float


def parts_of(batch: Batch, count: int) -> list[Part]:
    """The batch in ``count`` parts, or as many as it has examples; their sizes differ by one at most.

    Raises:
        UserError: batches of this kind can't be split.
    """
    slices = shares(batch.examples, min(count, batch.examples))
    if len(slices) <= 1:
        return [Part(batch, 0, 1.0)]
    if not hasattr(batch, "split"):
        raise UserError(f"accumulation: a batch that is a {type(batch).__name__} has no method split")
    sizes = [one.stop - one.start for one in slices]
    return [
        Part(part, one.start, size / batch.examples)
        for part, one, size in zip(batch.split(slices), slices, sizes, strict=True)
    ]


def finish(batch: Batch, parts: Sequence[Part]) -> None:
    """Keeps the states at the end of the parts for those of the next batch."""
    if len(parts) > 1:
        batch.join([part.batch for part in parts])  # type: ignore[attr-defined]


def weighted(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The mean over the examples of the batch, from the means over those of each part."""
    if len(parts) == 1:
        return values[0]
    return torch.stack([value * part.weight for value, part in zip(values, parts, strict=True)]).sum(0)
