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

    def averages(self, tensors: Sequence[Tensor], examples: int) -> list[Tensor]:
        """The mean over the processes of each tensor, in float64; all processes must call this.

        Args:
            tensors: means over the examples of this process.
            examples: how many they are.

        Raises:
            ValueError: another process has more or fewer, so that draws would be shared and means be wrong.
        """
        shapes = [tensor.shape for tensor in tensors]
        counts = torch.tensor([examples, examples**2], dtype=torch.double, device=tensors[0].device)
        joined = torch.cat([*(tensor.detach().double().flatten() for tensor in tensors), counts])
        torch.distributed.all_reduce(joined, group=self.group)
        joined /= self.size
        mean, square = joined[-2:].tolist()
        if square != mean**2:
            raise ValueError(
                f"process_group: this process has {examples} examples, and the mean over the processes is {mean:g}: "
                "give each an equal share of every batch, by drop_last or a sampler"
            )
        parts = joined[:-2].split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
