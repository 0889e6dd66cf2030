"""idx files: read as they state themselves, refused where header and contents disagree."""

import gzip
import struct

import numpy as np
import pytest
import torch

from stn_fast.data import idx
from stn_fast.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 3, 5), dtype=np.uint8)
HEADER = struct.pack(">4B3I", 0, 0, 8, 3, 7, 3, 5)
FILE = HEADER + IMAGES.tobytes()


@pytest.mark.parametrize("contents", [FILE, gzip.compress(FILE)], ids=["plain", "gzip"])
def test_the_array_is_read_with_its_shape(tmp_path, contents):
    (tmp_path / "file").write_bytes(contents)
    got = idx.read(tmp_path / "file")
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), IMAGES)
    got.zero_()  # it is writable memory of its own


def test_labels_have_one_dimension():
    assert idx.parse(struct.pack(">4BI", 0, 0, 8, 1, 3) + b"\1\0\2", "x").tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "is not an idx file: it starts with nothing"),
        (b"\x89PNG\r\n", "is not an idx file: it starts with 89 50 4e 47"),
        (FILE[:-1], "has 120 bytes where its header asks for 121"),
        (FILE + b"x", "has 122 bytes where its header asks for 121"),
        (FILE[:9], "has 9 bytes"),
        (HEADER[:3] + b"\0", "has 4 bytes"),
        (
            struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1),
            "has 16 bytes where its header asks for 79,228,162,458,924",
        ),
        (bytes([0, 0, 8, 255]) + bytes(4 * 255), r"states a shape that no array has \(.*found 255\); fetch it again"),
        (struct.pack(">4B65I", 0, 0, 8, 65, *[1] * 65) + b"x", r"states a shape that no array has \(.*found 65\)"),
        (struct.pack(">4B4I", 0, 0, 8, 4, 0, *[2**32 - 1] * 3), r"states a shape that no array has \(array is too big"),
        (b"\0\0\x0d" + FILE[3:], "holds values of idx type 0x0d; only unsigned bytes"),
        (gzip.compress(FILE)[:-9], "is not a whole gzip file"),
        (gzip.compress(FILE)[:-8] + b"\0" * 8, "is not a whole gzip file"),
        (b"\x1f\x8b" + b"\0" * 20, "is not a whole gzip file"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, contents, says):
    (tmp_path / "images").write_bytes(contents)
    with pytest.raises(UserError, match=f"images {says}") as caught:
        idx.read(tmp_path / "images")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent \(No such file"):
        idx.read(tmp_path / "absent")
