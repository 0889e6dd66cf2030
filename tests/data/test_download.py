"""Downloads: a file is there whole and as published, or not at all, and an error says in one line what to do."""

import hashlib
from pathlib import Path

import pytest

from stn_fast.data import data_root
from stn_fast.data.download import Published, fetch, verified
from stn_fast.errors import UserError
from stn_fast.files import cache_root

CONTENTS = bytes(range(256)) * 5000


def published(*urls, contents=CONTENTS):
    return Published("file.bin", len(contents), hashlib.sha256(contents).hexdigest(), urls)


def refused(folder, file):
    """The error's text; nothing but it may be left."""
    with pytest.raises(UserError) as caught:
        fetch(folder, file)
    assert not folder.exists() or list(folder.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_fetched_once(tmp_path, server, capsys):
    server.files["file.bin"] = CONTENTS
    folder, file = tmp_path / "new" / "folder", published(server.address + "file.bin")
    assert fetch(folder, file) == CONTENTS
    assert capsys.readouterr().err == f"downloading {server.address}file.bin (1.3 MB) to {folder}\n"
    assert [path.name for path in folder.iterdir()] == ["file.bin"]
    assert fetch(folder, file) == CONTENTS
    assert server.asked == ["file.bin"]
    assert capsys.readouterr().err == ""


def test_the_next_address_is_tried_where_one_fails(tmp_path, server):
    server.files["good"] = CONTENTS
    server.files["bad"] = CONTENTS[::-1]
    file = published(*(server.address + name for name in ("absent", "bad", "good")))
    assert fetch(tmp_path, file) == CONTENTS
    assert server.asked == ["absent", "bad", "good"]


def test_where_no_address_gives_the_file_the_error_says_which_from_where_and_what_to_do(tmp_path, server):
    url = server.address + "absent"
    said = refused(tmp_path, published(url))
    for part in (str(tmp_path / "file.bin"), url, "404", "by hand", "--data-root", "STN_FAST_DATA"):
        assert part in said


def test_without_a_home_directory_the_setting_that_helps_is_named(monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("STN_FAST_DATA", raising=False)
    with pytest.raises(UserError, match=r"no home directory.*--data-root or STN_FAST_DATA"):
        data_root()
    monkeypatch.delenv("STN_FAST_CACHE", raising=False)
    with pytest.raises(UserError, match=r"no home directory.*STN_FAST_CACHE"):
        cache_root()


def test_no_network_is_one_line(tmp_path, server):
    url = server.address + "file.bin"
    server.close()
    assert f"{url} gives no file" in refused(tmp_path, published(url))


def test_an_answer_that_stops_short_leaves_no_file(tmp_path, server):
    server.files["file.bin"] = CONTENTS[:1000]
    server.lengths["file.bin"] = len(CONTENTS)
    said = refused(tmp_path, published(server.address + "file.bin"))
    assert "is cut short (1,000 of 1,280,000 bytes)" in said


@pytest.mark.parametrize("contents", [CONTENTS[:-1] + b"x", CONTENTS + b"x" * 10**7])
def test_an_answer_that_is_another_file_leaves_no_file(tmp_path, server, contents):
    server.files["file.bin"] = contents
    assert "is not the published file" in refused(tmp_path, published(server.address + "file.bin"))


def test_a_kill_in_the_middle_leaves_no_file_of_that_name(tmp_path, server, monkeypatch):
    server.files["file.bin"] = CONTENTS

    def stop(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, published(server.address + "file.bin"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, server):
    server.files["file.bin"] = CONTENTS
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file\.bin is missing and cannot be written \(.+\); name another folder"):
        fetch(tmp_path / "file" / "below", published(server.address + "file.bin"))


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (CONTENTS[:-1], r"is cut short \(1,279,999 of 1,280,000 bytes\); delete it"),
        (b"", r"is cut short \(0 of"),
        (b"x" + CONTENTS[1:], r"is not the published file \(its SHA-256 differs\); delete it"),
        (CONTENTS + b"x", "is not the published file"),
    ],
)
def test_a_damaged_file_is_refused_and_left_to_its_owner(tmp_path, contents, says):
    (tmp_path / "file.bin").write_bytes(contents)
    with pytest.raises(UserError, match=rf"file\.bin {says}"):
        fetch(tmp_path, published())
    assert (tmp_path / "file.bin").read_bytes() == contents


def test_a_file_that_cannot_be_read_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*\(Is a directory\)"):
        verified(tmp_path, published())


def test_the_data_root_is_what_is_named_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STN_FAST_DATA", "/data")
    assert str(data_root("here")) == "here"
    assert str(data_root()) == "/data"
    monkeypatch.delenv("STN_FAST_DATA")
    assert data_root() == tmp_path / ".cache" / "stn_fast" / "data"
    assert data_root("~/data") == tmp_path / "data"
