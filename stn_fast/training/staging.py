"""Copies examples from host memory to a CUDA device while the device computes."""

from __future__ import annotations

import torch
from torch import Tensor

from stn_fast.data import Split


class Staging:
    """Sends batches of ``batch_size`` examples of ``split`` to ``device``, via pinned memory, on its own CUDA stream.

    It alternates between two buffers: one is filled while the other may still be being copied.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device) -> None:
        self.split, self.device, self.stream = split, device, torch.cuda.Stream(device)
        self._buffers = [Split(*(_pinned(part, batch_size) for part in split)) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def send(self, chosen: Tensor) -> Split:
        """Starts copying the examples ``chosen`` (batch_size,); call ``receive`` before using the batch."""
        self._turn = 1 - self._turn
        buffer, copied = self._buffers[self._turn], self._copied[self._turn]
        copied.synchronize()
        for part, pinned in zip(self.split, buffer, strict=True):
            torch.index_select(part, 0, chosen, out=pinned)
        with torch.cuda.stream(self.stream):
            batch = Split(*(pinned.to(self.device, non_blocking=True) for pinned in buffer))
            copied.record()
        return batch

    def receive(self, batch: Split) -> Split:
        """``batch``, the last one sent, ready for use on the current CUDA stream."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._copied[self._turn])
        for part in batch:
            part.record_stream(current)  # its memory belongs to the other stream
        return batch


def _pinned(part: Tensor, batch_size: int) -> Tensor:
    return torch.empty((batch_size, *part.shape[1:]), dtype=part.dtype, pin_memory=True)
