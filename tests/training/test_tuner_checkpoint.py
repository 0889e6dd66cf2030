"""Checkpoints of a SelfTuner are exact, atomic, checked, and read without running code."""

import errno
import json
import os
import pickle
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import stn_fast as stn
from stn_fast.errors import UserError
from stn_fast.training import tuner_checkpoint
from stn_fast.training.checkpoint import signed
from stn_fast.training.disk import CannotWrite


def tuner(seed=0, **options):
    torch.manual_seed(seed)
    tuned = stn.convert(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2)), quiet=True)
    return stn.SelfTuner(tuned, torch.optim.AdamW(tuned.parameters(), 1e-2, weight_decay=0), F.cross_entropy, **options)


def steps(one, numbers):
    for step in numbers:
        x = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        one.step((x, (x[:, 0] > 0).long()), (x.flip(0), (x.flip(0)[:, 0] > 0).long()))
    return one


def same(one, other):
    tensors = (one.state_dict()["method"]["model"].values(), other.state_dict()["method"]["model"].values())
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)) and one.history == other.history


@pytest.fixture
def folder(tmp_path):
    """With the checkpoints after 2 and 3 steps."""
    one = steps(tuner(), range(2))
    one.save(tmp_path)
    steps(one, [2]).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"method": "delta-stn"}])
def test_a_run_goes_on_bit_for_bit(options, tmp_path):
    one = steps(tuner(**options), range(2))
    assert one.save(tmp_path) == tmp_path / "step-00000002"
    steps(one, range(2, 5))
    other = tuner(seed=1, **options)
    assert other.load(tmp_path) == tmp_path / "step-00000002"
    assert not same(other, one)
    assert same(steps(other, range(2, 5)), one)


def test_there_may_be_no_checkpoint_yet(tmp_path):
    assert tuner().load(tmp_path / "none") is None


def test_the_last_checkpoints_are_kept(folder):
    one = tuner()
    one.load(folder)
    steps(one, [3]).save(folder)
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]
    steps(one, [4]).save(folder, keep=1)
    assert os.listdir(folder) == ["step-00000005"]
    one.save(folder, keep=1)  # replaces it
    assert same(loaded(folder), one)


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(folder):
    (folder / "step-00000003").rename(folder / "step-00000009")
    with pytest.warns(RuntimeWarning, match=r"step-00000009 is the checkpoint of step 3, under another name; trying"):
        assert loaded(folder).trained == 2


def test_damaged_checkpoints_after_the_one_that_was_loaded_are_removed(folder):
    shorten(folder / "step-00000003/state.json")
    (folder / "step-00000003").rename(folder / "step-00000009")
    with pytest.warns(RuntimeWarning, match="step-00000009"):
        one = loaded(folder)
    steps(one, [2]).save(folder)
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"]
    assert same(loaded(folder), one)


def loaded(folder):
    one = tuner(seed=1)
    assert one.load(folder)
    return one


FILES = ["manifest.json", "state.json", "shard-00001-model-00001-of-00001.safetensors"]


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def remove(path):
    path.unlink()


def add(path):
    path.with_name("shard-00002-model-00001-of-00001.safetensors").write_bytes(path.read_bytes())


@pytest.mark.parametrize("damage", [shorten, flip, remove, add])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, damage, folder):
    assert sorted(os.listdir(folder / "step-00000003")) == sorted(FILES)
    damage(folder / "step-00000003" / name)
    with pytest.warns(RuntimeWarning, match=r"load: .*step-00000003.*; trying the checkpoint before it"):
        one = loaded(folder)
    assert one.trained == 2
    damage(folder / "step-00000002" / name)
    with pytest.warns(RuntimeWarning), pytest.raises(UserError, match=r"every checkpoint under .* is damaged"):
        tuner().load(folder)


class Payload:
    def __reduce__(self):
        return os.abort, ()


def with_pickle(path):
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))  # as other writers of torch name their metadata
    return {".metadata": sha256((path / ".metadata").read_bytes()).hexdigest()}


def with_path_outside(path):
    return {"../state.json": sha256((path / "state.json").read_bytes()).hexdigest()}


LOCATION, WEIGHT = "method/model/tuned_hyperparameters.location", "method/model/0.weight"


def with_huge_shape(path):
    """The only shard of a tensor says that it is the last of 2**60 numbers."""
    return in_parts(path, LOCATION, [([2**60], slice(None))])


def with_a_hole(path):
    """Rows 4 and 5 are missing, and others are there twice."""
    return in_parts(path, WEIGHT, [([0, 0], slice(4)), ([2, 0], slice(2, 4)), ([6, 0], slice(6, 8))])


def with_rows_before_the_first(path):
    return in_parts(path, WEIGHT, [([-2, 0], slice(2)), ([2, 0], slice(2, 8))])


def in_parts(path, name, parts):
    """Writes parts of a tensor, [(offsets, index)], in a file each, which says that its part begins at the offsets."""
    with safe_open(path / FILES[2], "pt") as file:
        metadata = file.metadata()
    tensors, sums = load_file(path / FILES[2]), {}
    whole = tensors.pop(name)
    sharding = json.loads(metadata["DCP_SHARDING_INFO"])
    for number, (offsets, index) in enumerate(parts, 1):
        file = path / f"shard-{number:05}-model-00001-of-00001.safetensors"
        sharding[name] = {"saved_offsets": offsets}
        metadata["DCP_SHARDING_INFO"] = json.dumps(sharding)
        save_file({**tensors, name: whole[index].clone()}, file, metadata)
        sums[file.name] = sha256(file.read_bytes()).hexdigest()
        tensors = {}
    return sums


HOSTILE = {
    with_path_outside: "its files are not those of its manifest",
    with_huge_shape: f"{LOCATION} has 2 numbers, but its shape is",
    with_a_hole: f"{WEIGHT} has parts that overlap or are outside",
    with_rows_before_the_first: f"{WEIGHT} has parts that overlap or are outside",
}


def changed(change, folder):
    """The checkpoint with a change that its manifest agrees with."""
    steps(tuner(), range(2)).save(folder)
    path = folder / "step-00000002"
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"] |= change(path)
    (path / "manifest.json").write_text(json.dumps(signed(manifest)))
    return path


def test_a_pickle_in_a_checkpoint_is_not_opened(tmp_path):
    path = changed(with_pickle, tmp_path)
    assert tuner().load(tmp_path) == path


ROWS = [([0, 0], slice(4)), ([4, 0], slice(4, 8)), ([8, 0], slice(8, 8))]  # none in the last
BLOCKS = [([i, j], (slice(i, i + 4), slice(j, j + 3))) for i in (4, 0) for j in (0, 3)]


@pytest.mark.parametrize("parts", [ROWS, BLOCKS], ids=["rows", "blocks"])
def test_a_tensor_may_be_stored_in_any_parts(parts, tmp_path):
    changed(lambda path: in_parts(path, WEIGHT, parts), tmp_path)
    assert same(loaded(tmp_path), steps(tuner(), range(2)))


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_a_hostile_checkpoint_is_refused(change, tmp_path):
    changed(change, tmp_path)
    one = tuner()
    with pytest.warns(RuntimeWarning, match=HOSTILE[change]), pytest.raises(UserError, match="every checkpoint"):
        one.load(tmp_path)


@pytest.mark.parametrize("broken", ["fsync", "rename", "mkdir"])
def test_a_failed_write_leaves_the_checkpoints_before(broken, folder, monkeypatch):
    one = loaded(folder)
    steps(one, [3])

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, fail)
        with pytest.raises(CannotWrite, match=r"cannot write .*step-00000004 \(No space left on device\)"):
            one.save(folder)
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"]
    one.save(folder)
    assert same(loaded(folder), one)


def test_an_unfinished_checkpoint_is_not_read(folder, monkeypatch):
    one = steps(loaded(folder), [3])

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tuner_checkpoint, "put_in_place", killed)
        with pytest.raises(KeyboardInterrupt):
            one.save(folder)
    assert ".step-00000004.partial" in os.listdir(folder)
    assert loaded(folder).trained == 3
    one.save(folder)
    assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]


@pytest.fixture
def killed_between_renames(tmp_path, monkeypatch):
    """The directory of a run that was killed while it replaced its only checkpoint."""
    one, renamed, rename = steps(tuner(), range(2)), [], Path.rename
    one.save(tmp_path)

    def rename_once(path, target):
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            one.save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".step-00000002.partial", ".step-00000002.replaced"]
    return tmp_path


def test_a_checkpoint_that_was_being_replaced_is_loaded(killed_between_renames):
    assert loaded(killed_between_renames).trained == 2


def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_checkpoint_that_can_not_be_restored_is_an_error(killed_between_renames, monkeypatch):
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CannotWrite, match="Read-only file system"):
        tuner().load(killed_between_renames)


def test_loading_writes_nothing_but_a_restored_checkpoint(folder, monkeypatch):
    (folder / ".step-00000004.partial").mkdir()  # of another process that may still write it
    (folder / ".step-00000003.replaced").mkdir()
    for call in ("rename", "rmdir", "unlink", "mkdir"):
        monkeypatch.setattr(os, call, refuse)
    assert loaded(folder).trained == 3


def test_a_checkpoint_of_a_run_directory_is_refused_by_name(folder):
    from stn_fast.training import checkpoint

    checkpoint.write(folder, 9, {"weights": torch.ones(2)}, 9)
    with pytest.raises(UserError, match=r"step-00000009 is a checkpoint of format 7, but SelfTuner.load reads"):
        tuner().load(folder)


def test_what_can_not_be_saved_is_refused(tmp_path):
    one = steps(tuner(), range(1))
    with pytest.raises(ValueError, match="save: keep must be"):
        one.save(tmp_path, keep=0)
    one.method.optimizer.state["own"] = {"of": object()}
    with pytest.raises(UserError, match="a checkpoint can't hold"):
        one.save(tmp_path)
