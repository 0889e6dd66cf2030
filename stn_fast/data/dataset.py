"""Any ``torch.utils.data.Dataset`` of images and labels, read once into tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import index
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from stn_fast.data.splits import Split
from stn_fast.errors import UserError

CHANNELS = (1, 3)
LABELS = 2**63  # labels from 0 to LABELS - 1 fit in int64


def from_dataset(dataset: Dataset) -> Split:
    """All of ``dataset``'s (image, label) pairs: inputs (N, C, H, W) uint8, C = 1 or 3; targets (N,) int64.

    An image is a uint8 tensor (H, W) or (C, H, W), a uint8 NumPy array (H, W) or (H, W, C), or a PIL image of mode
    L or RGB; a label is a whole number, at least 0. Augmentation and normalisation belong to the network, so the data
    set must not transform its images to floats.

    Raises:
        UserError: an example is anything else (the message names it), images differ in shape, there are no examples, or
            the data set has no len() or indexing and is not an IterableDataset.

    Errors raised by the data set itself are passed on; from Python 3.11, with a note that names the example.
    """
    examples: Any = _listed(dataset) if isinstance(dataset, IterableDataset) else dataset
    count = _count(examples)
    if count == 0:
        raise UserError("the data set is empty; it needs at least one example")
    inputs, targets = torch.empty(0, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    for i in range(count):
        with _example(i) as where:
            image, label = _pair(examples[i], where)
            if i == 0:
                inputs = torch.empty((count, *image.shape), dtype=torch.uint8)
            if image.shape != inputs.shape[1:]:
                raise UserError(
                    f"{where} has shape {tuple(image.shape)} and example 0 {tuple(inputs.shape[1:])} (C, H, W); "
                    "all images must have the same shape: resize or crop them"
                )
            inputs[i], targets[i] = image, label
    return Split(inputs, targets)


@contextmanager
def _example(i: int) -> Iterator[str]:
    """The name of example ``i`` in errors; errors of the data set itself inside get a note with this name."""
    where = f"example {i} of the data set"
    try:
        yield where
    except Exception as error:
        if sys.version_info >= (3, 11) and not isinstance(error, UserError):
            error.add_note(f"while reading {where}")
        raise


def _listed(dataset: IterableDataset) -> list[Any]:
    examples: list[Any] = []
    end, source = object(), iter(dataset)
    while True:
        with _example(len(examples)):
            example = next(source, end)
        if example is end:
            return examples
        examples.append(example)


def _count(examples: Any) -> int:
    kind = type(examples).__name__
    cure = "pass a list, a Dataset with __len__ and __getitem__, or an IterableDataset"
    try:
        count = len(examples)
    except (TypeError, NotImplementedError) as error:
        raise UserError(f"the data set, of type {kind}, has no len() ({error}); {cure}") from error
    if not hasattr(type(examples), "__getitem__"):
        raise UserError(f"the data set, of type {kind}, cannot be indexed; {cure}")
    return count


def _pair(example: Any, where: str) -> tuple[Tensor, int]:
    try:
        if isinstance(example, (Mapping, str, Tensor, np.ndarray)):  # these may unpack to two, but not (image, label)
            raise TypeError
        image, label = example
    except (TypeError, ValueError):
        length = f" of length {len(example)}" if isinstance(example, (tuple, list)) else ""
        raise UserError(f"{where} must be a pair (image, label); it is a {type(example).__name__}{length}") from None
    try:
        number = index(label)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for an integer too large for int64
        number = -1
    if not 0 <= number < LABELS:
        raise UserError(f"{where} has the label {_shown(label)}; it must be the number of its class, 0 to 2**63 - 1")
    return _channels_first(image, where), number


def _shown(label: Any) -> str:
    """``label`` on one short line; only the type and shape of an array."""
    shape = tuple(getattr(label, "shape", ()))
    if shape:
        return f"of type {type(label).__name__} and shape {shape}"
    return shorten(repr(label), 60)


def _channels_first(image: Any, where: str) -> Tensor:
    """(C, H, W) uint8."""
    mode = getattr(image, "mode", None)  # a PIL image has one; nothing here imports PIL
    if isinstance(mode, str) and mode not in ("L", "RGB"):
        raise UserError(f"{where} is an image of mode {mode}; convert the image to L or RGB")
    try:
        values = image if isinstance(image, Tensor) else np.asarray(image)
    except ValueError as error:
        raise UserError(f"{where} has an image of type {type(image).__name__} that is no array ({error})") from error
    if values.dtype not in (torch.uint8, np.uint8):
        raise UserError(
            f"{where} holds {values.dtype}, but images must be uint8, 0 to 255; "
            "remove the transform that converts it, or convert it to uint8"
        )
    shape, layout = tuple(values.shape), "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
    pixels = values if isinstance(values, Tensor) else torch.from_numpy(values.copy())
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(0)
    elif pixels.ndim == 3 and not isinstance(image, Tensor):
        pixels = pixels.movedim(-1, 0)
    if pixels.ndim != 3 or pixels.shape[0] not in CHANNELS or 0 in shape:
        raise UserError(f"{where} has shape {shape}; it must be {layout} with 1 or 3 channels, or (H, W)")
    return pixels
