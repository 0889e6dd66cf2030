"""`benchmarks.saving` measures checkpoints in both ways, and what it recorded shows that the thread pays."""

import json
from pathlib import Path

import pytest

from benchmarks import saving
from stn_fast.errors import UserError
from stn_fast.training import checkpoint

RECORDED = Path(saving.__file__).parent / "results" / "saving-cpu.json"


def test_it_writes_the_same_checkpoint_in_both_ways_and_takes_steps_beside_the_second(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "ALONE", 3)
    written, write = [], checkpoint.write_encoded

    def note(root, step, *given):
        path = write(root, step, *given)
        written.append({file.name: file.read_bytes() for file in path.iterdir() if file.name != checkpoint.MANIFEST})
        return path

    monkeypatch.setattr(checkpoint, "write_encoded", note)
    arguments = ["--megabytes", "2", "--turns", "2", "--folder", str(tmp_path), "--out", str(tmp_path / "rows.json")]
    assert saving.main(arguments) == 0
    assert [*tmp_path.iterdir()] == [tmp_path / "rows.json"]
    assert len(written) == 6  # of two turns, after one that is not counted
    assert all(files == written[0] for files in written)
    assert sum(map(len, written[0].values())) > 2e6
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert {*saving.COLUMNS, "turns", "load", "processors", "versions"} == row.keys()
    assert (row["megabytes"], row["turns"]) == (2, 2)
    assert row["cost"] >= row["ratio"] > 0
    assert row["slowdown"] > 0
    heading, cells = capsys.readouterr().out.splitlines()
    assert heading.split() == [*saving.COLUMNS]
    assert cells.split()[0] == "2"


def test_wrong_numbers_are_named():
    with pytest.raises(UserError, match=r"--megabytes and --turns must be at least 1, got \[1, 0\] and 7"):
        saving.main(["--megabytes", "1", "0"])


def test_the_recorded_loop_is_held_up_for_a_fraction_of_the_time():
    rows = json.loads(RECORDED.read_text())
    assert [row["megabytes"] for row in rows] == [1, 30, 300]
    assert all(row["turns"] >= 5 for row in rows)
    assert all(row["ratio"] < 0.5 for row in rows)
    page = (Path(saving.__file__).parents[1] / "docs" / "results.md").read_text()
    for row in rows:
        assert f"| {row['megabytes']} MB | {row['ratio']:.2f} | {row['cost']:.2f} |" in page
