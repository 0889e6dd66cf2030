"""CIFAR-10: 60,000 colour images of 32 x 32 pixels, ten classes (Krizhevsky, 2009).

Its files are in ``cifar10/cifar-10-batches-py/`` under the data root, as published: pickled batches.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stn_fast import files
from stn_fast.data.download import Published, data_root, downloaded, verified, writing
from stn_fast.data.splits import Images, Split
from stn_fast.errors import UserError
from stn_fast.files import replace

FOLDER, BATCHES = "cifar10", "cifar-10-batches-py"
SHAPE = (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

ARCHIVE = Published(
    "cifar-10-python.tar.gz",
    170498071,
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
)
TRAIN = (
    Published("data_batch_1", 31035704, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"),
    Published("data_batch_2", 31035320, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"),
    Published("data_batch_3", 31035999, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"),
    Published("data_batch_4", 31035696, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"),
    Published("data_batch_5", 31035623, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"),
)
TEST = (Published("test_batch", 31035526, "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"),)


def load(root: str | Path | None = None) -> Images:
    """50,000 training and 10,000 test images, (N, 3, 32, 32) uint8, red, green, blue; targets 0 to 9.

    Args:
        root: the data root, by default as for `data_root`. Missing files are downloaded.

    Raises:
        UserError: a file is damaged, or missing and cannot be downloaded.
    """
    folder = data_root(root) / FOLDER / BATCHES
    missing = [file for file in (*TRAIN, *TEST) if not files.exists(folder / file.name)]
    if missing:
        with downloaded(folder / ARCHIVE.name, ARCHIVE) as archive:
            unpack(archive, folder, missing)
    return Images(_split(folder, TRAIN), _split(folder, TEST), MEAN, STD)


def unpack(archive: Path, folder: Path, files: Sequence[Published]) -> None:
    """Extracts only ``files`` of the checked archive into ``folder``, each atomically."""
    with tarfile.open(archive) as tar:
        for file in files:
            member = tar.extractfile(f"{BATCHES}/{file.name}")
            assert member is not None  # a regular file in every archive with the published checksum
            with writing(folder / file.name):
                replace(folder / file.name, member.read())


def _split(folder: Path, files: Sequence[Published]) -> Split:
    parts = [unpickle(verified(folder / file.name, file), str(folder / file.name)) for file in files]
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Split(inputs, targets)


def unpickle(contents: bytes, name: str) -> Split:
    """The images (N, 3, 32, 32) uint8 and labels (N,) int64 of a batch file; errors call it ``name``.

    The unpickler only allows what NumPy arrays of numbers need and refuses every other global, so that no file can call
    anything else.

    Raises:
        UserError: the file is not a pickle, needs another global, or has no matching ``data`` and ``labels``.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(contents), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{name} cannot be unpickled ({type(error).__name__}: {error}); fetch it again") from None
    values = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    pixels, labels = values.get("data"), np.asarray(values.get("labels", ()))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (np.prod(SHAPE),):
        raise UserError(f"{name} holds no 'data' of bytes, (images, {np.prod(SHAPE)})")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(f"{name} holds {len(pixels)} images and no whole number for each as 'labels'")
    return Split(torch.from_numpy(pixels).view(-1, *SHAPE), torch.from_numpy(labels.astype(np.int64)))


_reconstruct = np.empty(0).__reduce__()[0]
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _ArraysOnly(pickle.Unpickler):
    """Only allows the globals that rebuild a NumPy array, by the names that NumPy 1 and NumPy 2 write."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which batches don't need")
        return _KNOWN[module, name]


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key
