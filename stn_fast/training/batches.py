"""Batches of a split in an order that is a pure function of (seed, pass): resuming needs only a count."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stn_fast.data import Split


class Batches:
    """The endless sequence of shuffled batches of ``split``; every pass has its own order.

    Each batch holds exactly ``batch_size`` examples; what a pass leaves over it skips, and another order leaves
    others over. Splits that draw from one seed are told apart by ``stream``.
    """

    def __init__(self, split: Split, batch_size: int, *, seed: int, stream: int) -> None:
        if not 1 <= batch_size <= len(split.inputs):
            raise ValueError(f"batch_size wants 1 to {len(split.inputs)}, the examples there are; got {batch_size}")
        self.split, self.batch_size, self.seed, self.stream = split, batch_size, seed, stream
        self.per_pass = len(split.inputs) // batch_size
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> Split:
        """Batch number ``index`` of the sequence, which starts at 0 and has no end."""
        number, position = divmod(index, self.per_pass)
        if number != self._pass:
            self._pass, self._order = number, self._shuffled(number)
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        return Split(self.split.inputs[chosen], self.split.targets[chosen])

    def _shuffled(self, number: int) -> Tensor:
        order = np.random.default_rng([self.seed, self.stream, number]).permutation(len(self.split.inputs))
        return torch.from_numpy(order).to(self.split.inputs.device)
