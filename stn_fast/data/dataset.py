"""Any ``torch.utils.data.Dataset`` of images and labels, read once into tensors."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from stn_fast.data.splits import Split
from stn_fast.errors import UserError

CHANNELS = (1, 3)


def from_dataset(dataset: Dataset) -> Split:
    """All of ``dataset``'s (image, label) pairs: inputs (N, C, H, W) uint8, C = 1 or 3; targets (N,) int64.

    An image is a uint8 tensor (H, W) or (C, H, W), a uint8 NumPy array (H, W) or (H, W, C), or a PIL image of mode
    L or RGB; a label is a whole number, at least 0. Augmentation and normalisation belong to the network, so the data
    set wants no transform that makes floats of its images.

    Raises:
        UserError: naming the example, for anything else, for images of different shapes, and for no examples at all.
    """
    examples: Any = list(dataset) if isinstance(dataset, IterableDataset) else dataset
    count = len(examples)
    if count == 0:
        raise UserError("the data set is empty; it needs at least one example")
    inputs, targets = torch.empty(0, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    for i in range(count):
        where = f"example {i} of the data set"
        image, label = _pair(examples[i], where)
        if i == 0:
            inputs = torch.empty((count, *image.shape), dtype=torch.uint8)
        if image.shape != inputs.shape[1:]:
            raise UserError(
                f"{where} has shape {tuple(image.shape)} and example 0 {tuple(inputs.shape[1:])} (C, H, W); "
                "images must be of one shape: resize or crop them"
            )
        inputs[i], targets[i] = image, label
    return Split(inputs, targets)


def _pair(example: Any, where: str) -> tuple[Tensor, int]:
    try:
        image, label = example
    except (TypeError, ValueError):
        raise UserError(f"{where} is no pair of an image and a label but {type(example).__name__}") from None
    try:
        number = index(label)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise UserError(f"{where} has the label {label!r}; it wants the number of its class, 0 or above")
    return _channels_first(image, where), number


def _channels_first(image: Any, where: str) -> Tensor:
    """(C, H, W) uint8."""
    mode = getattr(image, "mode", None)  # a PIL image has one; nothing here imports PIL
    if isinstance(mode, str) and mode not in ("L", "RGB"):
        raise UserError(f"{where} is an image of mode {mode}; it wants L or RGB, which its convert method makes")
    values = image if isinstance(image, Tensor) else np.asarray(image)
    if values.dtype not in (torch.uint8, np.uint8):
        raise UserError(f"{where} holds {values.dtype} where uint8, 0 to 255, is meant; leave out what converts it")
    shape, layout = tuple(values.shape), "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
    pixels = values if isinstance(values, Tensor) else torch.from_numpy(values.copy())
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.ndim == 3 and not isinstance(image, Tensor):
        pixels = pixels.movedim(-1, 0)
    if pixels.ndim != 3 or pixels.shape[0] not in CHANNELS or 0 in shape:
        raise UserError(f"{where} has shape {shape}; it wants {layout} with 1 or 3 channels, or (H, W)")
    return pixels
