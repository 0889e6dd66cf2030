"""Fashion-MNIST: the standard files give the published images; missing ones are fetched, damaged ones refused."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from stn_fast.data import fashion_mnist
from stn_fast.data.download import Published
from stn_fast.errors import UserError

RANDOM = np.random.default_rng(0)
SMALL = {name: RANDOM.integers(0, 256, (size, 28, 28), dtype=np.uint8) for name, size in (("train", 6), ("test", 4))}


@pytest.fixture
def small(server, monkeypatch):
    """The data set as ten images, published by ``server``; the files by name."""
    for name, images in SMALL.items():
        labels = np.arange(len(images), dtype=np.uint8)
        published = []
        for part, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            contents = gzip.compress(header + array.tobytes())
            file = f"{name}-{part}.gz"
            server.files[file] = contents
            digest = hashlib.sha256(contents).hexdigest()
            published.append(Published(file, len(contents), digest, (server.address + file,)))
        monkeypatch.setattr(fashion_mnist, name.upper(), tuple(published))
    return server.files


def test_missing_files_are_fetched_and_read(tmp_path, small):
    data = fashion_mnist.load(tmp_path)
    assert {path.name for path in (tmp_path / "fashion_mnist").iterdir()} == set(small)
    for split, images in zip(data[:2], SMALL.values(), strict=True):
        assert (split.inputs.dtype, split.targets.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(split.inputs.numpy(), images[:, None])
        assert split.targets.tolist() == list(range(len(images)))


def test_a_changed_file_is_refused_before_it_is_read(tmp_path, small, monkeypatch):
    fashion_mnist.load(tmp_path)
    file = tmp_path / "fashion_mnist" / "train-images.gz"
    contents = file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    monkeypatch.setattr(fashion_mnist.idx, "parse", lambda contents, name: pytest.fail(f"{name} was read"))
    with pytest.raises(UserError, match=r"train-images\.gz is not the published file"):
        fashion_mnist.load(tmp_path)


def test_the_standard_files_are_the_published_images(standard):
    train, test, mean, std = fashion_mnist.load(standard("fashion_mnist"))
    assert (train.inputs.shape, test.inputs.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert train.targets[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert train.targets.bincount().tolist() == [6000] * 10
    assert test.targets.bincount().tolist() == [1000] * 10
    pixels = train.inputs.numpy() / np.float32(255)
    assert mean == (round(pixels.mean(dtype=np.float64), 4),)
    assert std == (round(pixels.std(dtype=np.float64), 4),)
