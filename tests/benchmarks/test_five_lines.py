"""The command that compares a converted network of timm with the plain one."""

import json
import sys

import pytest
import torch
from libraries import library

from benchmarks import five_lines
from stn_fast.data import Images, Split, fashion_mnist


@pytest.fixture
def few_images(monkeypatch):
    """Images of ten kinds that differ in their brightness."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    pixels = torch.randint(30, (400, 1, 28, 28), generator=draw) + 22 * labels[:, None, None, None]
    split = Split(pixels.to(torch.uint8), labels)
    monkeypatch.setattr(fashion_mnist, "load", lambda root: Images(split, split, (0.5,), (0.25,)))


def test_it_prints_and_writes_three_runs_of_each_seed(few_images, tmp_path, capsys):
    library("timm")
    threads, file = torch.get_num_threads(), tmp_path / "rows.json"
    assert five_lines.main(["--seeds", "1", "--epochs", "2", "--size", "190", "--json", str(file)]) == 0
    torch.set_num_threads(threads)
    tuned, plain, longer = json.loads(file.read_text())
    assert [row["run"] for row in (tuned, plain, longer)] == list(five_lines.RUNS)
    assert tuned["values"].keys() >= {"pos_drop", "proj_drop", "drop_path1", "head_drop", "weight_decay"}
    assert tuned["values"]["pos_drop"] != five_lines.GUESS
    assert tuned["epochs"] == plain["epochs"] == 2 < longer["epochs"]
    assert plain["cpu_seconds"] < tuned["cpu_seconds"] <= longer["cpu_seconds"]
    assert longer["valid_loss"] < plain["valid_loss"]
    assert f"self-tuned / plain, of each seed: {tuned['test_loss'] / plain['test_loss']:.3f}" in capsys.readouterr().out


def test_a_missing_library_is_named_with_the_extra_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit):
        five_lines.main([])
    assert "timm is missing: pip install 'stn-fast[examples]'" in capsys.readouterr().err


def test_splits_are_disjoint_and_the_same_for_each_seed(few_images):
    splits = [five_lines.data(None, size=100) for _ in range(2)]
    for one, other in zip(*splits, strict=True):
        assert torch.equal(one.inputs, other.inputs)
    train, valid, _ = splits[0]
    assert len(torch.cat([train.inputs, valid.inputs]).flatten(1).unique(dim=0)) == 200
