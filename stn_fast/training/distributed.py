"""Processes that share a batch: each has its own examples of it, and gradients are averaged over all examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from stn_fast.ops.gates import wide


class Processes:
    """A process group of torch.distributed, each process with a share of the examples of a batch.

    Args:
        group: the processes, all of which must call the methods.
        equal: whether it is an error if they have shares of different sizes.

    Attributes:
        size: how many processes there are.
        rank: the number of this one; its examples of the global batch come after those of all processes before it.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, equal: bool = True) -> None:
        self.group, self.equal = group, equal
        self.size = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)

    def averages(self, tensors: Sequence[Tensor], examples: int) -> list[Tensor]:
        """The mean over the examples of all processes of each tensor, in float64.

        Args:
            tensors: means over the examples of this process.
            examples: how many they are.

        Raises:
            ValueError: another process has more or fewer, so that draws would be shared, if that is an error.
        """
        shapes = [tensor.shape for tensor in tensors]
        counts = torch.tensor([examples, examples**2], dtype=torch.double, device=tensors[0].device)
        joined = torch.cat([*(tensor.detach().double().flatten() * examples for tensor in tensors), counts])
        torch.distributed.all_reduce(joined, group=self.group)
        if self.equal:
            total, squares = joined[-2:].tolist()
            if squares * self.size != total**2:
                raise ValueError(
                    f"process_group: this process has {examples} examples, and the mean over the processes is "
                    f"{total / self.size:g}: give each an equal share of every batch, by drop_last or a sampler"
                )
        parts = (joined[:-2] / joined[-2]).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor], examples: int) -> None:
        """Replaces each tensor, a mean over the examples of this process, by the mean over those of all.

        One reduction for each dtype, in float32 or wider. The host does not wait for a CUDA device.
        """
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            count = same[0].new_ones(1)
            joined = torch.cat([*(tensor.flatten() for tensor in same), count]).to(wide(dtype)).mul_(examples)
            torch.distributed.all_reduce(joined, group=self.group)
            joined /= joined[-1:].clone()
            parts = joined[:-1].split([tensor.numel() for tensor in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Gives all processes the parameters and buffers of the first one."""
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), group=self.group, group_src=0)
