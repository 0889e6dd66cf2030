"""Torch's random number generators, used at states of one's own and left as they were."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch


def default_generators(device: torch.device) -> list[torch.Generator]:
    """The generators that torch uses if none is named: that of the CPU, and that of a CUDA ``device``."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


class OwnStates:
    """While entered, ``generators`` have states of their own: at first those of ``seed``, then where they were left."""

    def __init__(self, generators: Sequence[torch.Generator], seed: Sequence[int]) -> None:
        number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
        self._generators = generators
        self._states = [torch.Generator(one.device).manual_seed(number).get_state() for one in generators]

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._swap()

    def _swap(self) -> None:
        found = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        self._states = found
