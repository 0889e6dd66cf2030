"""A run directory: it keeps what is not the run's, one run at a time, and names what it cannot use."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_files import rows

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint, disk
from stn_fast.training.run import run
from stn_fast.training.run_directory import RunDirectory

OURS = ("config.yaml", "data.json", "metrics.jsonl", "result.json", "schedule.png")

HOLD = """
import sys
from stn_fast.training.run import run
from stn_fast.training.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", [*OURS, "checkpoints", "checkpoints/weights.pt"])
def test_a_file_that_no_run_wrote_is_refused_and_kept(train, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine: 1\n")
    with pytest.raises(UserError, match=rf"{name} was not written by a run.*another --run-dir.*--no-resume"):
        train()
    assert file.read_text() == "mine: 1\n"


def test_starting_over_keeps_files_that_are_not_checkpoints(train, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/weights.pt", "notes.txt", "config.yaml"):
        (tmp_path / "run" / name).write_text("mine")
    directory = train("schedule.epochs=1", resume=False)
    assert (directory / "checkpoints" / "weights.pt").read_text() == "mine"
    assert (directory / "notes.txt").read_text() == "mine"
    assert "recipe: digits" in (directory / "config.yaml").read_text()


def test_a_run_that_died_before_its_first_checkpoint_starts_again(train, same_run, whole):
    died = train("schedule.epochs=1", name="died")
    checkpoint.clear(died / "checkpoints")
    (died / "result.json").unlink()
    same_run(whole, train(name="died"))


WRONG_SHAPES = ["- 1\n", "3\n", "recipe: digits\nhyperparameters: 3\n", "recipe: digits\nhyperparameters: {1: {}}\n"]


@pytest.mark.parametrize("text", ["", "recipe: digits\n", "a: [1\n", "\0", "[" * 5000, *WRONG_SHAPES])
def test_the_error_for_a_truncated_config_names_the_file_and_what_to_do(train, text):
    directory = train("schedule.max_steps=5")
    (directory / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run/config.yaml is not a run's configuration .*restore it.*--no-resume"):
        train()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "result.json"])
def test_a_file_in_the_run_that_cannot_be_read_is_an_error_of_the_user_and_nothing_is_lost(train, name):
    directory = train("schedule.max_steps=5")
    kept = sorted(directory.rglob("*"))
    (directory / name).unlink()
    (directory / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}.*Is a directory"):
        train("schedule.max_steps=5") if name == "result.json" else train("schedule.max_steps=9")
    assert sorted(directory.rglob("*")) == kept


@pytest.mark.parametrize("manifest", ["[]", "3", "null", '{"best_step": 1e999}', "{}", "[" * 100_000, "\0"])
def test_a_damaged_manifest_makes_its_checkpoint_a_damaged_one(train, same_run, whole, tmp_path, manifest):
    directory = shutil.copytree(whole, tmp_path / "damaged")
    newest = checkpoint.steps(directory / "checkpoints")[-1]
    (checkpoint.path_of(directory / "checkpoints", newest) / "manifest.json").write_text(manifest)
    (directory / "result.json").unlink()
    train(name="damaged")
    same_run(whole, directory)


def test_checkpoints_without_permission_are_a_users_error(train, monkeypatch):
    directory = train("schedule.max_steps=5")
    iterdir = Path.iterdir

    def refused(path):
        if path == directory / "checkpoints":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match=r"cannot list .*checkpoints \(Permission denied\)"):
        train("schedule.max_steps=5")


def test_a_second_run_in_the_same_directory_is_refused(train):
    pytest.importorskip("fcntl")
    directory = train("schedule.max_steps=5")
    before = rows(directory)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(UserError, match=rf"another run is using {directory}; .*--run-dir"):
                train(resume=resume)
        assert rows(directory) == before
        holder.communicate("")
    train()


def test_without_locks_a_run_goes_ahead(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with RunDirectory(tmp_path).locked():
        pass


def test_directory_entries_are_synced_before_files_that_rely_on_them(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("descriptors have no names here")
    monkeypatch.setattr(os, "fsync", note)
    directory = RunDirectory(tmp_path / "runs" / "one")
    assert synced == [str(tmp_path / "runs"), str(tmp_path)]
    synced.clear()
    directory.write_result({"a": 1})
    partial, folder = synced
    assert re.fullmatch(r"\.result\.json\.[0-9a-f]{32}\.partial", Path(partial).name)
    assert folder == str(directory.path) == str(Path(partial).parent)
    synced.clear()
    checkpoint.write(directory.checkpoints, 1, {}, 1)
    assert synced[0] == str(directory.path)
    assert synced[-1] == str(directory.checkpoints)


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    directory.write_result({"a": 1})

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(disk.CannotWrite, match=r"result.json \(No space left on device\)"):
        directory.write_result({"a": 2})
    assert json.loads(directory.result.read_text()) == {"a": 1}


def test_a_run_whose_checkpoints_are_gone_loses_nothing(train, make_config):
    directory = train()
    found = json.loads((directory / "result.json").read_text())
    checkpoint.clear(directory / "checkpoints")
    kept = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
    assert run(make_config(), digits.build) == found
    with pytest.raises(UserError, match=r"none of its checkpoints: restore .*checkpoints from a copy"):
        run(make_config("schedule.epochs=7"), digits.build)
    assert kept == {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def test_an_unfinished_run_without_a_checkpoint_starts_over_and_says_so(train, capsys):
    directory = train()
    checkpoint.clear(directory / "checkpoints")
    (directory / "result.json").unlink()
    train()
    assert "holds a run without a checkpoint: starting over from step 0" in capsys.readouterr().err


def test_a_run_that_never_began_leaves_no_directory_that_was_not_there(make_config):
    config = make_config("schedule.batch_size=100000")
    for made in (False, True):
        if made:
            Path(config.directory).mkdir()
        with pytest.raises(UserError, match="batch_size"):
            run(config, digits.build)
        assert Path(config.directory).exists() == made
