"""Checkpoints: whole or absent, never silently damaged, and no more of them than needed."""

import errno
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch

from stn_fast.errors import UserError
from stn_fast.training import checkpoint
from stn_fast.training.disk import CannotWrite


def state(step):
    return {"weights": torch.full((3,), float(step)), "step": step, "nested": {"none": None, "text": "x"}}


def damage(path):
    contents = bytearray((path / checkpoint.STATE).read_bytes())
    contents[len(contents) // 2] ^= 1
    (path / checkpoint.STATE).write_bytes(contents)


def no_warning(text):
    raise AssertionError(text)


def test_a_state_reads_back_as_it_was_written(tmp_path):
    back = checkpoint.read(checkpoint.write(tmp_path, 7, state(7), best_step=7))
    assert torch.equal(back.pop("weights"), state(7)["weights"])
    assert back == {"step": 7, "nested": {"none": None, "text": "x"}}


def test_the_last_two_stay_and_the_best_of_each(tmp_path):
    for step, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)]:
        checkpoint.write(tmp_path, step, state(step), best)
    assert checkpoint.steps(tmp_path) == [5, 6]
    checkpoint.write(tmp_path, 7, state(7), 7)
    assert checkpoint.steps(tmp_path) == [5, 6, 7]


def test_nothing_partial_is_taken_for_a_checkpoint(tmp_path):
    checkpoint.write(tmp_path, 1, state(1), 1)
    torch.save(state(2), tmp_path / "stray.pt")
    (tmp_path / ".step-00000002.partial").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.write(tmp_path, 2, state(2), 1)
    assert checkpoint.read_newest(tmp_path, "cpu", no_warning)[1]["step"] == 2


def test_a_write_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, 1, state(1), 1)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_through", fail)
    with pytest.raises(CannotWrite, match=r"step-00000002 \(No space left on device\)"):
        checkpoint.write(tmp_path, 2, state(2), 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.read_newest(tmp_path, "cpu", no_warning)[1]["step"] == 1


def test_damage_is_found_and_the_one_before_is_taken(tmp_path):
    for step in (1, 2):
        path = checkpoint.write(tmp_path, step, state(step), 1)
    damage(path)
    warnings = []
    assert checkpoint.read_newest(tmp_path, "cpu", warnings.append)[1]["step"] == 1
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert "falling back" in warnings[0]


FILES = [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_damage(tmp_path, file):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    (path / file).unlink()
    with pytest.raises(checkpoint.DamagedCheckpoint, match="cannot be read"):
        checkpoint.read(path)


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_anywhere_is_damage(tmp_path, file):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    contents = (path / file).read_bytes()
    for length in range(len(contents)):
        (path / file).write_bytes(contents[:length])
        with pytest.raises(checkpoint.DamagedCheckpoint, match=file):
            checkpoint.read(path)


@pytest.mark.parametrize("file", FILES)
def test_a_bit_flipped_anywhere_is_damage(tmp_path, file):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    contents = (path / file).read_bytes()
    for position in range(8 * len(contents)):
        flipped = bytearray(contents)
        flipped[position // 8] ^= 1 << position % 8
        (path / file).write_bytes(flipped)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=file):
            checkpoint.read(path)
    (path / file).write_bytes(contents)
    assert checkpoint.read(path)["step"] == 1


def test_if_all_checkpoints_are_damaged_the_error_says_what_to_do(tmp_path):
    for step in (1, 2):
        damage(checkpoint.write(tmp_path, step, state(step), 1))
    with pytest.raises(UserError, match=r"every checkpoint under .* is damaged.*--no-resume"):
        checkpoint.read_newest(tmp_path, "cpu", lambda text: None)


def test_a_damaged_checkpoint_is_removed_after_falling_back(tmp_path):
    for step in (1, 2, 4):
        path = checkpoint.write(tmp_path, step, state(step), 1)
    damage(path)
    checkpoint.write(tmp_path, 3, state(3), 1)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert checkpoint.read_newest(tmp_path / "absent", "cpu", no_warning) is None


class Killed(BaseException):
    """Ends a write as abruptly as a signal that cannot be caught."""


def test_a_kill_while_a_step_is_written_again_does_not_lose_it(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, 1, state(1), 1)
    rename = Path.rename

    def kill_between(path, target):
        if path.name.endswith(".partial"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill_between)
        with pytest.raises(Killed):
            checkpoint.write(tmp_path, 1, state(1), 1)
    assert checkpoint.steps(tmp_path) == []
    checkpoint.recover(tmp_path)
    assert checkpoint.read_newest(tmp_path, "cpu", no_warning)[1]["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_remains_of_an_interrupted_write_are_removed(tmp_path):
    for name in (".step-00000002.partial", ".step-00000003.replaced", "step-00000003"):
        (tmp_path / name).mkdir()
    checkpoint.write(tmp_path, 4, state(4), 4)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_clearing_keeps_files_that_are_not_checkpoints(tmp_path):
    checkpoint.write(tmp_path, 1, state(1), 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / "weights.pt").touch()
    (tmp_path / "step-notes.txt").touch()
    assert {entry.name for entry in checkpoint.foreign(tmp_path)} == {"weights.pt", "step-notes.txt"}
    checkpoint.clear(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"weights.pt", "step-notes.txt"}


def rewrite(path, contents=(), **changed):
    """Replaces files and entries of the manifest, and keeps every checksum right."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text()) | changed
    for file, content in dict(contents).items():
        (path / file).write_bytes(content)
        manifest["files"][file] = hashlib.sha256(content).hexdigest()
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


class Payload:
    def __reduce__(self):
        return pytest.fail, ("a checkpoint ran code",)


@pytest.mark.parametrize("file", FILES[:2])
@pytest.mark.parametrize("content", [b"neither format", pickle.dumps(Payload())], ids=["noise", "pickle"])
def test_files_of_another_kind_are_damage_and_run_no_code(tmp_path, file, content):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    rewrite(path, {file: content})
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"step-00000001 cannot be loaded") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_only_the_files_of_a_checkpoint_are_read(tmp_path):
    """Names in a manifest are looked up and never opened, so they can't lead elsewhere."""
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    (tmp_path / "elsewhere").write_bytes(b"secret")
    sums = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    rewrite(path, files={**sums, "../elsewhere": "0"})
    assert checkpoint.read(path)["step"] == 1


def test_a_state_that_no_checkpoint_can_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match=r"can't hold scheduler/lambda, a builtins\.function"):
        checkpoint.write(tmp_path, 1, {"scheduler": {"lambda": lambda step: 1.0}}, 1)
    assert not [*tmp_path.iterdir()]


def test_a_manifest_that_is_no_mapping_is_damage(tmp_path):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    (path / checkpoint.MANIFEST).write_text("[]")
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"manifest\.json is damaged"):
        checkpoint.read(path)


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    rewrite(path, format=checkpoint.FORMAT + 1)
    here, other = checkpoint.FORMAT, checkpoint.FORMAT + 1
    says = rf"step-00000001 is a checkpoint of format {other}.*reads format {here}.*--no-resume"
    with pytest.raises(UserError, match=says):
        checkpoint.read_newest(tmp_path, "cpu", no_warning)


def test_the_format_of_older_versions_is_named(tmp_path):
    path = checkpoint.write(tmp_path, 1, state(1), 1)
    (path / checkpoint.MANIFEST).write_text('{"format": 6, "step": 1, "best_step": 1, "sha256": "0"}')
    with pytest.raises(UserError, match=r"a checkpoint of format 6, but this stn_fast reads format 7") as caught:
        checkpoint.read(path)
    assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)
