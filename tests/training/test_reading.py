"""A run directory read back: what is damaged is one line that names it, what is null is NaN."""

import json
import math
import shutil

import pytest

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training.layering import resolve
from stn_fast.training.reading import read_run, read_runs
from stn_fast.training.run import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of two steps."""
    directory = tmp_path_factory.mktemp("reading") / "whole"
    run(resolve(digits.config(), None, ["schedule.max_steps=2", f"run_dir={directory}"]), digits.build)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy")


NAMES = {part: {} for part in ("hyperparameters", "hyperparameters_low", "hyperparameters_high")}


@pytest.mark.parametrize(
    "line",
    [
        {"phase": "eval"},
        {"phase": "eval", "loss": "x", "epoch": 0, **NAMES},
        {"phase": "eval", "loss": True, "epoch": 0, **NAMES},
        {"phase": "eval", "loss": 1.0, "epoch": None, **NAMES},
        {"phase": "eval", "loss": 1.0, "epoch": -1, **NAMES},
        {"phase": "eval", "loss": 1.0, "epoch": "0", **NAMES},
        {"phase": "eval", "loss": 10**400, "epoch": 0, **NAMES},
        {"phase": "eval", "loss": 1.0, "epoch": 0},
        {"phase": "eval", "loss": 1.0, "epoch": 0, **NAMES, "hyperparameters": [1, 2]},
        {"phase": "eval", "loss": 1.0, "epoch": 0, **NAMES, "hyperparameters": {"weight_decay": "x"}},
        {"phase": "eval", "loss": 1.0, "epoch": 0, **NAMES, "test_loss": []},
        {"phase": "eval", "loss": 1.0, "epoch": 0, **NAMES, "loss_unit": 3},
        {"phase": "test", "loss": 1.0, "epoch": 0},
        {"phase": ["eval"], "loss": 1.0, "epoch": 0},
        {"phase": "train", "epoch": 1},
        [],
        "eval",
        None,
    ],
)
def test_a_row_of_another_shape_is_named_by_its_line(copy, line):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"^line \d of .*metrics.jsonl is not a row of metrics; remove it$"):
        read_run(copy)


@pytest.mark.parametrize(
    ("name", "contents", "says"),
    [
        ("metrics.jsonl", b"\xff\xfe", "not UTF-8: byte 0xff at offset 0"),
        ("metrics.jsonl", b"[" * 100_000, "line 1 of"),
        ("metrics.jsonl", b"", "no evaluation yet"),
        ("config.yaml", b"\xff", "not valid YAML"),
        ("config.yaml", b"- 1\n", "must hold a mapping"),
        ("config.yaml", b"recipe: digits\nhyperparameters: 3\n", "hyperparameters = 3: must be a section"),
        ("config.yaml", b"recipe: digits\nhyperparameters: {x: {init: 1}}\n", "lacks the hyperparameter 'x'"),
        ("config.yaml", b"recipe: digits\nhyperparameters: {1: {init: 1}}\n", "hyperparameters = 1: must be text"),
    ],
)
def test_a_damaged_file_is_named(copy, name, contents, says):
    (copy / name).write_bytes(contents)
    with pytest.raises(UserError, match=says) as caught:
        read_run(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_a_directory_in_the_place_of_a_file_is_named(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    with pytest.raises(UserError, match=name):
        read_run(copy)


@pytest.mark.parametrize("text", ["null", "Infinity", "NaN"])
def test_a_number_that_is_not_finite_is_nan_and_never_the_best(copy, text):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    row |= {"loss": "LOSS", "test_loss": "LOSS"}
    row["hyperparameters_high"]["weight_decay"] = "LOSS"
    (copy / "metrics.jsonl").write_text("\n".join([json.dumps(row).replace('"LOSS"', text), *lines]) + "\n")
    read = read_run(copy)
    first = read.rows["eval"][0]
    assert math.isnan(first["loss"])
    assert math.isnan(first["test_loss"])
    assert math.isnan(first["hyperparameters_high"]["weight_decay"])
    assert math.isfinite(read.best["loss"])
    (copy / "metrics.jsonl").write_text(json.dumps(row).replace('"LOSS"', text) + "\n")
    with pytest.raises(UserError, match="no evaluation"):
        read_run(copy)


def test_of_several_directories_those_that_hold_a_run_are_read_and_the_others_named(whole, tmp_path):
    said = []
    runs = read_runs([tmp_path / "absent", whole, tmp_path], said.append)
    assert [run.name for run in runs] == ["whole"]
    assert [line.split(str(tmp_path))[0] for line in said] == ["there is no run directory ", ""]
    with pytest.raises(UserError, match="none of the 2 directories"):
        read_runs([tmp_path, tmp_path / "absent"], said.append)
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_runs([tmp_path], said.append)


def test_a_run_keeps_the_unit_of_its_losses(whole):
    assert read_run(whole).loss_unit == "nats"
