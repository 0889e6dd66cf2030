"""The idx format of MNIST and its relatives: a header that states the shape, then the values, row by row."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stn_fast.errors import UserError

UNSIGNED_BYTES = 0x08


def read(path: str | Path) -> Tensor:
    """The uint8 array in the idx file ``path``, plain or compressed with gzip.

    Raises:
        UserError: the file cannot be read, or as ``parse``.
    """
    try:
        contents = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); name an idx file, plain or .gz") from None
    return parse(contents, str(path))


def parse(contents: bytes, name: str) -> Tensor:
    """The uint8 array in the contents of an idx file; errors call the file ``name``.

    Bytes 0 and 1 are 0, byte 2 is the type of the values, byte 3 the number of dimensions; then comes a big-endian
    32-bit size for each dimension.

    Raises:
        UserError: the gzip stream is damaged, the header is invalid or has an impossible shape, or the number of values
            does not fit the shape.
    """
    if contents[:2] == b"\x1f\x8b":
        try:
            contents = gzip.decompress(contents)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{name} is not a whole gzip file ({error}); fetch it again") from None
    if len(contents) < 4 or contents[:2] != b"\0\0":
        raise UserError(f"{name} is not an idx file: it starts with {contents[:4].hex(' ') or 'nothing'}")
    kind, dimensions = contents[2], contents[3]
    if kind != UNSIGNED_BYTES:
        raise UserError(f"{name} holds values of idx type 0x{kind:02x}; only unsigned bytes, 0x08, are supported")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(contents[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))
    if dimensions == 0 or len(contents) != expected:
        raise UserError(f"{name} has {len(contents):,} bytes where its header asks for {expected:,}; fetch it again")
    try:
        values = np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
    except ValueError as error:
        raise UserError(f"{name} states a shape that no array has ({error}); fetch it again") from None
    return torch.from_numpy(values.copy())
