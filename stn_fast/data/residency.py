"""Where a data set lives while a network trains on it: on the device, whole, wherever that leaves room to train."""

from __future__ import annotations

import torch

from stn_fast.data.splits import DataSet

SHARE = 0.25  # of the device's free memory; the rest is for the network and what it computes


def placed(data: DataSet, device: torch.device | str) -> DataSet:
    """``data`` on ``device`` where it takes at most ``SHARE`` of a CUDA device's free memory, else ``data`` itself.

    What stays in host memory reaches the device batch by batch, through `stn_fast.training.batches.Batches`.
    """
    device = torch.device(device)
    if device.type == "cuda" and size(data) > SHARE * torch.cuda.mem_get_info(device)[0]:
        return data
    return DataSet(*(split.to(device) for split in data))


def size(data: DataSet) -> int:
    """Bytes of all inputs and targets."""
    return sum(tensor.numel() * tensor.element_size() for split in data for tensor in split)
