"""Processes that share a batch: each has its own examples of it, and gradients are averaged over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor


class Processes:
    """A process group of torch.distributed, each process with an equal share of the examples of a batch.

    Attributes:
        size: how many processes there are.
        rank: the number of this one; its examples of the global batch come after those of all processes before it.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group = group
        self.size = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)

    def averages(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the processes of each tensor, in the widest dtype of them; all processes must call this."""
        shapes = [tensor.shape for tensor in tensors]
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
        torch.distributed.all_reduce(joined, group=self.group)
        parts = (joined / self.size).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
