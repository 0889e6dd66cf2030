"""The fingerprint of a data set: SHA-256 of its contents, by which a run recognises that its data have not changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from stn_fast.data.splits import DataSet

# Names of the parts of a fingerprint in messages.
PARTS = {
    "train": "training split",
    "valid": "validation split",
    "test": "test split",
    "vocabulary": "vocabulary",
}


def fingerprint(data: DataSet, vocabulary: Sequence[str] = ()) -> dict[str, str]:
    """``sha256:...`` of each split of ``data``, and of the ``vocabulary`` if there is one, by the keys of ``PARTS``.

    The digest of a split covers the dtype, shape and values of its tensors and the order of its examples, but not their
    device, memory layout or source files. Loaders whose examples are not in tensors have none.
    """
    splits = data._asdict().items()
    digests = {name: _digest(split.tensors) for name, split in splits if split is not None and split.tensors}
    if vocabulary:
        digests["vocabulary"] = _named(hashlib.sha256(json.dumps(list(vocabulary)).encode()))
    return digests


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return _named(digest)


def _named(digest: hashlib._Hash) -> str:
    return f"sha256:{digest.hexdigest()}"
