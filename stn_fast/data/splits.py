"""Data sets as splits of inputs and targets: their types, how they are divided, and how they are checked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stn_fast.errors import UserError


class Split(NamedTuple):
    """Examples along dimension 0: ``inputs`` (N, ...), float32 or uint8 images, and ``targets`` (N, ...)."""

    inputs: Tensor
    targets: Tensor

    @property
    def examples(self) -> int:
        """N, counted by the targets: a batch may have several inputs."""
        targets = self.targets if isinstance(self.targets, Tensor) else pytree.tree_leaves(self.targets)[0]
        return targets.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a fingerprint of the split covers."""
        return tuple(self)

    def to(self, device: torch.device | str) -> Split:
        """The same examples on ``device``."""
        return Split(self.inputs.to(device), self.targets.to(device))


class DataSet(NamedTuple):
    """Training, validation and test examples, disjoint."""

    train: Split
    valid: Split
    test: Split


class Images(NamedTuple):
    """Published images, uint8 (N, C, H, W), with ``mean`` and ``std`` per channel of the training pixels / 255."""

    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]


def split_validation(train: Split, valid_size: int, seed: int) -> tuple[Split, Split]:
    """(training, validation) with ``valid_size`` validation examples, chosen at random by ``seed``.

    Raises:
        UserError: one of the two would be empty.
    """
    examples = len(train.inputs)
    if not 1 <= valid_size < examples:
        raise UserError(f"valid_size = {valid_size}: must be at least 1 and leave some of the {examples} to train on")
    order = _order(examples, seed, "valid")
    return _chosen(train, order[valid_size:]), _chosen(train, order[:valid_size])


def fraction(split: Split, share: float, seed: int) -> Split:
    """A fraction ``share`` of the examples, at least one, chosen by ``seed``; smaller fractions are subsets of it.

    Raises:
        UserError: ``share`` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UserError(f"train_fraction (--train-fraction) = {share}: must be above 0 and at most 1")
    if share == 1:
        return split
    examples = len(split.inputs)
    return _chosen(split, _order(examples, seed, "fraction")[: max(1, round(share * examples))])


def _order(examples: int, seed: int, purpose: str) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *purpose.encode()]).permutation(examples))


def _chosen(split: Split, order: Tensor) -> Split:
    order = order.to(split.inputs.device)
    return Split(*(part.index_select(0, order) for part in split))


def checked(data: DataSet) -> DataSet:
    """Returns ``data`` after checking that every split is non-empty and finite, with as many inputs as targets.

    Raises:
        UserError: a check fails; the message names the split and, for NaN or infinity, the first such example.
    """
    for name, split in data._asdict().items():
        examples, targets = len(split.inputs), len(split.targets)
        if examples != targets:
            raise UserError(f"the {name} split has {examples} inputs and {targets} targets; they must match")
        if examples == 0:
            raise UserError(f"the {name} split is empty; it needs at least one example")
        for part, values in split._asdict().items():
            if not values.is_floating_point():
                continue
            bad = (~torch.isfinite(values)).nonzero()
            if len(bad):
                place = tuple(bad[0].tolist())
                raise UserError(
                    f"the {name} split holds {values[place].item()} in {part}{list(place)}: "
                    f"{len(bad)} of {values.numel()} values are not finite; repair or drop those examples"
                )
    return data
