"""CIFAR-10: the standard batches give the published images, and nothing is unpickled that was not checked."""

import errno
import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stn_fast import files
from stn_fast.data import cifar10
from stn_fast.data.download import Published
from stn_fast.errors import UserError

RANDOM = np.random.default_rng(0)
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PIXELS = {name: RANDOM.integers(0, 256, (2, 3072), dtype=np.uint8) for name in NAMES}


def pickled(batch, module="numpy.core.multiarray"):
    """``batch`` with its arrays rebuilt by ``module``, whichever NumPy writes it."""
    contents = pickle.dumps(batch, protocol=3)
    for name in (b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"):
        contents = contents.replace(b"c" + name, b"c" + module.encode() + b"\n")
    return contents


def batch(name="test_batch", **changed):
    return {b"batch_label": b"x", b"data": PIXELS[name], b"labels": [7, 3], b"filenames": [b"a", b"b"]} | {
        key.encode(): value for key, value in changed.items()
    }


def published(name, contents, *urls):
    return Published(name, len(contents), hashlib.sha256(contents).hexdigest(), urls)


@pytest.fixture
def small(server, monkeypatch):
    """The data set as twelve images in an archive published by ``server``; also a file that has no business there."""
    batches = {name: pickled(batch(name)) for name in NAMES}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, contents in {**batches, "../../escaped": b"x", "readme.html": b"x"}.items():
            member = tarfile.TarInfo(f"{cifar10.BATCHES}/{name}")
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    server.files["archive"] = archive.getvalue()
    files = tuple(published(name, contents) for name, contents in batches.items())
    monkeypatch.setattr(cifar10, "ARCHIVE", published("a.tar.gz", archive.getvalue(), server.address + "archive"))
    monkeypatch.setattr(cifar10, "TRAIN", files[:5])
    monkeypatch.setattr(cifar10, "TEST", files[5:])
    return server


def test_a_missing_data_set_is_fetched_unpacked_and_read(tmp_path, small):
    data = cifar10.load(tmp_path)
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    assert {path.name for path in folder.iterdir()} == set(NAMES)
    assert not list(tmp_path.rglob("escaped"))
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (torch.uint8, torch.int64)
    for split, names in ((data.train, NAMES[:5]), (data.test, NAMES[5:])):
        expected = np.concatenate([PIXELS[name] for name in names]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(split.inputs.numpy(), expected)
        assert split.targets.tolist() == [7, 3] * len(names)
    cifar10.load(tmp_path)
    assert small.asked == ["archive"]


def test_only_what_is_missing_is_unpacked(tmp_path, small):
    cifar10.load(tmp_path)
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    kept = folder / "data_batch_2"
    before = kept.stat().st_ino
    (folder / "test_batch").unlink()
    cifar10.load(tmp_path)
    assert kept.stat().st_ino == before


def test_an_archive_put_there_by_hand_is_read_as_the_error_promises(tmp_path, small):
    contents = small.files.pop("archive")
    with pytest.raises(UserError, match=r"put the file there by hand") as caught:
        cifar10.load(tmp_path)
    archive = Path(str(caught.value).partition(" is missing")[0])
    archive.write_bytes(contents[:-5])
    with pytest.raises(UserError, match=r"a\.tar\.gz is cut short"):
        cifar10.load(tmp_path)
    archive.write_bytes(contents)
    assert len(cifar10.load(tmp_path).train.inputs) == 10
    assert archive.read_bytes() == contents
    assert small.asked == ["archive"]


@pytest.mark.parametrize("damage", [lambda contents: contents[:-5], lambda contents: b"x" + contents[1:]])
def test_a_damaged_archive_leaves_nothing_behind(tmp_path, small, damage):
    small.files["archive"] = damage(small.files["archive"])
    with pytest.raises(UserError, match=r"a\.tar\.gz is missing, and http") as caught:
        cifar10.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_leaves_no_part_of_a_batch(tmp_path, small, monkeypatch):
    def fail(path, contents):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_through", fail)
    with pytest.raises(UserError, match=r"data_batch_1 is missing and cannot be written \(No space left on device\)"):
        cifar10.load(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda contents: contents[:1000], r"data_batch_3 is cut short \(1,000 of [\d,]+ bytes\)"),
        (lambda contents: contents[:-9] + b"x" + contents[-8:], "data_batch_3 is not the published file"),
    ],
)
def test_a_damaged_batch_is_refused_before_it_is_unpickled(tmp_path, small, monkeypatch, damage, says):
    cifar10.load(tmp_path)
    file = tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(damage(file.read_bytes()))
    unpickle = cifar10.unpickle

    def watched(contents, name):
        assert not name.endswith("data_batch_3")
        return unpickle(contents, name)

    monkeypatch.setattr(cifar10, "unpickle", watched)
    with pytest.raises(UserError, match=says):
        cifar10.load(tmp_path)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_batches_of_old_and_new_numpy_are_read_without_a_warning(module, recwarn):
    contents = pickled(batch(), module)
    assert module.encode() in contents
    inputs, targets = cifar10.unpickle(contents, "batch")
    np.testing.assert_array_equal(inputs.numpy().reshape(2, -1), PIXELS["test_batch"])
    assert targets.tolist() == [7, 3]
    assert not recwarn.list


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (os.system, "touch {}", r"\w+\.system"),
        (eval, "open('{}', 'w')", r"builtins\.eval"),
        (np.load, "{}", "numpy.*load"),
    ],
)
def test_a_pickle_that_calls_anything_is_refused_and_calls_nothing(tmp_path, function, argument, named):
    trap = tmp_path / "sprung"
    contents = pickled(batch(labels=Calls(function, argument.format(trap))))
    with pytest.raises(UserError, match=rf"evil cannot be unpickled \(UnpicklingError: it asks for {named}, which"):
        cifar10.unpickle(contents, "evil")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", r"batch cannot be unpickled \(EOFError"),
        (b"no pickle", "batch cannot be unpickled"),
        (pickled(batch())[:-100], "batch cannot be unpickled"),
        (pickled([1]), r"holds no 'data' of bytes, \(images, 3072\)"),
        (pickled(batch(data=[1])), "holds no 'data'"),
        (pickled(batch(data=np.zeros((2, 3071), np.uint8))), "holds no 'data'"),
        (pickled(batch(data=np.zeros((2, 3072)))), "holds no 'data'"),
        (pickled(batch(labels=[1, 2, 3])), "holds 2 images and no whole number for each"),
        (pickled(batch(labels=[0.5, 1])), "holds 2 images and no whole number for each"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_by_name(contents, says):
    with pytest.raises(UserError, match=says) as caught:
        cifar10.unpickle(contents, "batch")
    assert "\n" not in str(caught.value)


def test_the_standard_files_are_the_published_images(standard):
    train, test, mean, std = cifar10.load(standard("cifar10"))
    assert (train.inputs.shape, test.inputs.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    assert train.targets[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test.targets[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert train.inputs[0, :, 0, 0].tolist() == [59, 62, 63]
    assert train.targets.bincount().tolist() == [5000] * 10
    assert test.targets.bincount().tolist() == [1000] * 10
    counts = torch.stack([train.inputs[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).double()
    values, total = torch.arange(256).double() / 255, counts[0].sum()
    means = counts @ values / total
    assert mean == tuple(round(value, 4) for value in means.tolist())
    squares = (counts * (values - means[:, None]) ** 2).sum(1) / (total - 1)
    assert std == tuple(round(value, 4) for value in squares.sqrt().tolist())
