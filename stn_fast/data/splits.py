"""What every data set is: three splits of inputs and targets, checked before anything trains on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stn_fast.errors import UserError


class Split(NamedTuple):
    """Examples along dimension 0: ``inputs`` (N, ...) float32 and ``targets`` (N, ...)."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Split:
        """The same examples on ``device``."""
        return Split(self.inputs.to(device), self.targets.to(device))


class DataSet(NamedTuple):
    """Training, validation and test examples, disjoint."""

    train: Split
    valid: Split
    test: Split


def checked(data: DataSet) -> DataSet:
    """``data`` itself, once every split is non-empty, matched in length and finite.

    Raises:
        UserError: naming the split and, for NaN or infinity, the first example that holds one.
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
