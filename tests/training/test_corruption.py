"""Damaged files of a run directory and hostile checkpoints: reported by name, and never loaded without a word."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from run_files import result, rows
from short_run import short
from test_checkpoint import rewrite
from test_states import safetensors_file

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.run import run

CHECKPOINT = (checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST)
PLACES = (0.0, 0.3, 0.7, 1.0)  # of the bytes that are changed, and of the ends of what is left


def truncated(place):
    def damage(file):
        contents = file.read_bytes()
        file.write_bytes(contents[: int(place * (len(contents) - 1))])

    return damage


def flipped(place):
    def damage(file):
        contents = bytearray(file.read_bytes())
        contents[int(place * (len(contents) - 1))] ^= 4
        file.write_bytes(contents)

    return damage


def a_directory(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    **{f"truncated at {place}": truncated(place) for place in PLACES},
    **{f"flipped at {place}": flipped(place) for place in PLACES},
    "deleted": Path.unlink,
    "a directory": a_directory,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 45 of 72 steps, to be copied."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    run(short(directory, "schedule.max_steps=45"), digits.build)
    return directory


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", CHECKPOINT)
def test_a_damaged_checkpoint_of_a_run_is_reported_and_the_one_before_is_used(copy, file, damage):
    root, warnings = copy / "checkpoints", []
    *_, before, last = checkpoint.steps(root)
    DAMAGE[damage](checkpoint.path_of(root, last) / file)
    path, state = checkpoint.read_newest(root, "cpu", warnings.append)
    assert path == checkpoint.path_of(root, before)
    assert state["train_steps"] + state["valid_steps"] == before
    (warning,) = warnings
    assert f"step-{last:08d}" in warning
    assert file in warning


# What the same command then does: "goes on" to the numbers of a run that nothing disturbed, or says the text.
OTHERWISE = {
    ("config.yaml", "truncated at 1.0"): "goes on",  # without the end of its last line
    ("config.yaml", "deleted"): "has no config.yaml",
    ("config.yaml", "a directory"): "config.yaml is not a run's configuration",
    ("data.json", "truncated at 1.0"): "goes on",
    ("data.json", "deleted"): "goes on",  # with a warning
    ("metrics.jsonl", "deleted"): "metrics.jsonl holds fewer",
    ("metrics.jsonl", "a directory"): "cannot read",
}
SAYS = {"config.yaml": "run.*(config.yaml|other settings)", "data.json": "data", "metrics.jsonl": "metrics.jsonl"}


# Rows of metrics have no checksum. A changed digit in one is not noticed; it is only reported, nothing depends on it.
UNNOTICED = {("metrics.jsonl", f"flipped at {place}") for place in PLACES[1:3]}


@pytest.mark.parametrize(
    ("file", "damage"), [case for case in itertools.product(SAYS, DAMAGE) if case not in UNNOTICED]
)
def test_a_damaged_file_of_a_run_is_reported_and_nothing_is_changed(copy, stopped, file, damage, whole):
    DAMAGE[damage](copy / file)
    config = short(copy, "schedule.max_steps=46")
    expected = OTHERWISE.get((file, damage), SAYS[file])
    if expected == "goes on":
        run(config, digits.build)
        assert [row for row in rows(copy) if row["step"] <= 40] == [row for row in rows(whole) if row["step"] <= 40]
        return
    with pytest.raises(UserError, match=expected) as told:
        run(config, digits.build)
    assert str(copy) in str(told.value)
    assert checkpoint.steps(copy / "checkpoints") == checkpoint.steps(stopped / "checkpoints")


@pytest.mark.parametrize("damage", ["truncated at 0.0", "truncated at 0.7", "flipped at 0.0", "deleted"])
def test_a_damaged_result_is_computed_again(copy, stopped, damage):
    DAMAGE[damage](copy / "result.json")
    run(short(copy, "schedule.max_steps=45"), digits.build)
    assert result(copy) == result(stopped)


def test_a_checkpoint_under_the_name_of_another_step_is_damage(copy):
    root = copy / "checkpoints"
    *_, before, last = checkpoint.steps(root)
    shutil.copytree(checkpoint.path_of(root, before), checkpoint.path_of(root, last + 1))
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"step-{last + 1:08d} is the checkpoint of step {before},"):
        checkpoint.read(checkpoint.path_of(root, last + 1))


FEW = 4 * 2**20  # bytes that reading a small checkpoint may take at most
TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}


def header(**changed):
    return {checkpoint.TENSORS: safetensors_file({"weights": TENSOR | changed}, b"\0" * 12)}


STATE = b'{"weights": {"$tensor": "weights"}, "step": 2}'
HOSTILE = {
    "shape of 8 GiB": header(shape=[2**31]),
    "shape of 2**120": header(shape=[2**60, 2**60]),
    "data of 8 GiB": header(shape=[2**31], data_offsets=[0, 2**33]),
    "header of 8 GiB": {checkpoint.TENSORS: (2**33).to_bytes(8, "little") + b"{}"},
    "negative shape": header(shape=[-3]),
    "shape that is no list": header(shape={"a": 1}),
    "objects": header(dtype="O"),
    "missing tensor": {checkpoint.STATE: b'{"weights": {"$tensor": "../../../etc/passwd"}}'},
    "path for a name": {checkpoint.STATE: STATE.replace(b'"weights"}', b'"/etc/passwd"}')},
    "nested": {checkpoint.STATE: b'{"step":' * 50_000 + b"1" + b"}" * 50_000},
    "nested tags": {checkpoint.STATE: b'{"$tuple":[' * 900 + b"]}" * 900},
    "NaN": {checkpoint.STATE: STATE.replace(b"2}", b"NaN}")},
    "Infinity": {checkpoint.STATE: STATE.replace(b"2}", b"-Infinity}")},
    "key twice": {checkpoint.STATE: STATE.replace(b"2}", b'2, "step": 9}')},
    "tag of code": {checkpoint.STATE: b'{"$module": "os", "name": "system"}'},
    "digits": {checkpoint.STATE: STATE.replace(b"2}", b"9" * 100_000 + b"}")},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_with_right_checksums_is_refused_and_takes_no_memory(tmp_path, kind):
    state = {"weights": torch.zeros(3), "step": 2}
    for step in (1, 2):
        path = checkpoint.write(tmp_path, step, state | {"step": step}, 1)
    rewrite(path)
    assert checkpoint.read(path)["step"] == 2  # it is what is rewritten that is refused
    rewrite(path, HOSTILE[kind])
    warnings, before = [], peak_memory(reset=True)
    assert checkpoint.read_newest(tmp_path, "cpu", warnings.append)[1]["step"] == 1
    assert peak_memory() - before < FEW + 50 * sum(map(len, HOSTILE[kind].values()))
    (warning,) = warnings
    assert f"{path} cannot be loaded (" in warning
    assert len(warning) < 500


def peak_memory(reset=False):
    """The most memory since the last reset, in bytes; 0 where the system can't tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    except OSError:
        return 0


def test_memory_that_is_taken_and_given_back_is_seen():
    if not (before := peak_memory(reset=True)):
        pytest.skip("the system doesn't tell")
    torch.zeros(2**26).add_(1)
    assert peak_memory() - before > 2**27


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_names_of_tensors_are_no_paths(tmp_path, name):
    """They are keys; a checkpoint may have them, and nothing is opened by them."""
    path = checkpoint.write(tmp_path / "checkpoints", 1, {name: torch.ones(2)}, 1)
    assert {file.name for file in path.iterdir()} == {*CHECKPOINT}
    assert checkpoint.read(path)[name].tolist() == [1, 1]
    assert [*tmp_path.iterdir()] == [tmp_path / "checkpoints"]


def test_a_manifest_with_a_key_twice_or_deep_nesting_is_damage(tmp_path):
    path = checkpoint.write(tmp_path, 1, {"step": 1}, 1)
    right = (path / checkpoint.MANIFEST).read_text()
    assert json.loads(right.replace("{", '{"step": 5, ', 1)) == json.loads(right)
    for wrong in (
        right.replace("{", '{"step": 5, ', 1),
        '{"files":' * 9000 + "1" + "}" * 9000,
        right.replace("1", "NaN"),
    ):
        (path / checkpoint.MANIFEST).write_text(wrong)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"manifest\.json is damaged"):
            checkpoint.read(path)
