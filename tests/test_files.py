"""Paths that users name: ~ is expanded however the path is given, and what can't be looked at is one line."""

import os
from pathlib import Path

import pytest

from stn_fast import files, train
from stn_fast.data import cifar10, fashion_mnist, ptb, wikitext2
from stn_fast.data.download import data_root
from stn_fast.errors import UserError
from stn_fast.files import cache_root
from stn_fast.kernels.autotune import cache_file
from stn_fast.recipes import digits
from stn_fast.recipes.texts import load_files
from stn_fast.training.config import Config, HyperparameterConfig
from stn_fast.training.layering import read_yaml, resolve

LONG = "a" * 300


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home directory; the current one is another."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.delenv("STN_FAST_DATA", raising=False)
    return home


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder that may not be looked into: chmod would not stop root, so the calls that ask are made to fail."""
    folder = tmp_path / "locked"
    folder.mkdir()

    def refusing(ask):
        def asked(path, *args, **kwargs):
            if folder in (path, *path.parents) and (path != folder or ask.__name__ != "stat"):
                raise PermissionError(13, "Permission denied", str(path))
            return ask(path, *args, **kwargs)

        return asked

    for name in ("stat", "iterdir", "open"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    return folder


def test_a_run_directory_below_home_is_made_there_however_it_is_named(home):
    (home / "c.yaml").write_text("run_dir: ~/from_file\n")
    for option in (["--run-dir=~/flag"], ["--set=run_dir=~/set"], ["--config=~/c.yaml"]):
        assert train.main(["--max-steps", "1", *option]) == 0
    assert {path.name for path in home.iterdir() if path.name[0] != "."} - {"c.yaml"} == {"flag", "set", "from_file"}
    assert list(Path.cwd().iterdir()) == []


def test_data_and_caches_below_home_are_found_there(home, monkeypatch):
    monkeypatch.setenv("STN_FAST_DATA", "~/data")
    monkeypatch.setenv("STN_FAST_CACHE", "~/cache")
    assert data_root() == data_root(resolve(digits.config()).data_root) == home / "data"
    config = resolve(digits.config(), None, ["data_root=~/set"])
    assert data_root(config.data_root) == home / "set"
    assert cache_root() == cache_file().parent == home / "cache"


def test_a_missing_home_directory_is_one_line_of_error(home, capsys):
    assert train.main(["--run-dir=~nobody-at-all/run"]) == 2
    said = capsys.readouterr().err
    assert "no home directory" in said
    assert "--run-dir" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("recipe", ["../up", "/etc/x", "a/b", "a\nb", "..", "\x1b[31mred"])
def test_a_recipes_name_stays_in_one_folder_below_runs(recipe):
    config = Config(recipe=recipe, hyperparameters={"a": HyperparameterConfig(init=0.5)})
    folder = Path(config.directory)
    assert folder.parent == Path("runs")
    assert os.path.normpath(folder) == str(folder)
    assert folder.name.isprintable()


LOADERS = [fashion_mnist.load, cifar10.load, ptb.load, wikitext2.load, load_files]


@pytest.mark.parametrize("load", LOADERS)
def test_a_data_root_with_too_long_a_name_is_an_error_of_the_user(load, tmp_path):
    with pytest.raises(UserError, match=r"cannot access .*\(File name too long\)"):
        load(tmp_path / LONG)


@pytest.mark.parametrize("load", LOADERS)
def test_a_data_root_without_permission_is_a_users_error(load, locked):
    with pytest.raises(UserError, match=r"cannot access .*\(Permission denied\)"):
        load(locked)


@pytest.mark.parametrize("option", ["--run-dir", "--data-root", "--config", "--set=run_dir"])
@pytest.mark.parametrize("value", [LONG, "a\0b"])
def test_an_impossible_path_is_one_line_and_status_2(option, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoted = '"a\\0b"' if "\0" in value and "--set" in option else value
    assert train.main(["text", f"{option}={quoted}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "error: " in said


def test_missing_files_are_distinguished_from_inaccessible_ones(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not files.exists(tmp_path / "absent")
    assert not files.exists(tmp_path / "file" / "below")
    assert files.is_file(tmp_path / "file")
    assert not files.is_directory(tmp_path / "file")
    assert files.entries(tmp_path / "file") == files.entries(tmp_path / "absent") == []
    for path in (tmp_path / LONG, tmp_path / "loop"):
        for ask in (files.exists, files.is_file, files.is_directory, files.entries):
            with pytest.raises(UserError, match="cannot access"):
                ask(path)


def test_a_configuration_that_may_not_be_read_or_is_not_utf_8_is_an_error_of_the_user(locked, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*: Permission denied"):
        read_yaml(str(locked / "c.yaml"))
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match=r"c.yaml is not valid YAML \(.*0xff"):
        read_yaml(str(tmp_path / "c.yaml"))


def test_a_partial_file_has_a_unique_name_and_is_removed(tmp_path):
    names = set()
    for _ in range(10):
        with files.beside(tmp_path / "file.bin") as partial:
            partial.write_bytes(b"half")
            names.add(partial)
    assert len(names) == 10
    assert {name.parent for name in names} == {tmp_path}
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    files.replace(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, b"new")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"old"]


def test_a_lock_keeps_another_process_out_until_it_is_given_back(tmp_path):
    pytest.importorskip("fcntl")
    lock = tmp_path / "lock"
    with files.locked(lock), pytest.raises(files.Locked, match="lock"), files.locked(lock, wait=False):
        pass
    with files.locked(lock, wait=False):
        pass
