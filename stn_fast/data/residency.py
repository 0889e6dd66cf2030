"""Placement of a data set during training: entirely on the device, if enough memory is left for training."""

from __future__ import annotations

import torch

from stn_fast.data.splits import DataSet

SHARE = 0.25  # largest fraction of the device's free memory for data; the rest is for the network and activations


def placed(data: DataSet, device: torch.device | str) -> DataSet:
    """``data`` on ``device``, unless it needs more than ``SHARE`` of a CUDA device's free memory.

    Data that stay in host memory are copied to the device batch by batch by `stn_fast.training.batches.Batches`.
    """
    device = torch.device(device)
    if device.type == "cuda" and size(data) > SHARE * torch.cuda.mem_get_info(device)[0]:
        return data
    return DataSet(*(split.to(device) for split in data))


def size(data: DataSet) -> int:
    """Bytes of all inputs and targets."""
    return sum(tensor.numel() * tensor.element_size() for split in data for tensor in split)
