"""python -m stn_fast.explore: its files agree with each other and the run, and every error is one line."""

import base64
import json
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_fast as stn
from stn_fast import explore, train
from stn_fast.exploration import figure
from stn_fast.exploration.response import Curve, Exploration, Map, Point
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.plot import png

SHORT = ["digits", "--epochs", "2", "--set", "method.warmup_epochs=1"]
FEW = ["--points", "3", "--examples", "60"]
FILES = {"explore.png", "explore.json", "explore.html"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A finished run, to be read only."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*SHORT, "--run-dir", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def written(directory, tmp_path_factory):
    """The folder of the three files of that run."""
    out = tmp_path_factory.mktemp("written") / "made" / "for it"
    assert explore.main([str(directory), *FEW, "--out", str(out)]) == 0
    return out


def contents(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_the_three_files_are_written_and_the_table_is_printed(directory, tmp_path, capsys):
    before = contents(directory)
    assert explore.main([str(directory), *FEW, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "explore.json").read_text())
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
    assert contents(directory) == before
    assert said.err == "evaluating 60 of 400 validation examples at each point\n"
    lines = said.out.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("hyperparameter"))
    rows = [line.split() for line in lines[head + 2 : head + 7]]
    assert [row[0] for row in rows] == [one["name"] for one in found["hyperparameters"]]
    for row, one in zip(rows, found["hyperparameters"], strict=True):
        numbers = [one["here"]["value"], one["scale"], *(one[place]["loss"] for place in ("low", "here", "high"))]
        numbers += [one["range"], one["slope"], one["curvature"], one["lowest"]["loss"], one["lowest"]["value"]]
        # Losses have four decimals, all others at least two digits.
        assert [float(cell) for cell in row[1:]] == pytest.approx(numbers, rel=0.051, abs=5.1e-5)
    assert f"are in {tmp_path / 'out'}." in lines[-1]


def test_the_files_are_in_the_run_directory_by_default(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert explore.main([str(copy), *FEW, "--no-pairs"]) == 0
    assert {file.name for file in copy.iterdir()} >= FILES
    assert json.loads((copy / "explore.json").read_text())["map"] is None


def test_the_json_has_all_numbers(written, directory):
    found = json.loads((written / "explore.json").read_text())
    result = json.loads((directory / "result.json").read_text())
    assert (found["recipe"], found["method"], found["seed"], found["step"]) == ("digits", "stn", 0, result["steps"])
    last = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["recorded_loss"] == last["loss"]
    assert (found["examples"], found["validation_examples"], found["loss_unit"]) == (60, 400, "nats")
    here = {one["name"]: one["here"]["value"] for one in found["hyperparameters"]}
    assert here == result["hyperparameters_end"]
    for one in found["hyperparameters"]:
        assert one["curve"]["shift"] == [-4.0, -2.0, 0.0, 2.0, 4.0]
        assert one["curve"]["loss"][2] == found["loss"]
        assert all(len(column) == 5 for column in one["curve"].values())
    assert len(found["map"]["losses"]) == 5


def test_the_page_needs_no_other_file(written):
    text = (written / "explore.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    (picture,) = [source.removeprefix("data:image/png;base64,") for source in sources]
    assert base64.b64decode(picture, validate=True) == (written / "explore.png").read_bytes()
    assert "http" not in text.replace(picture, "")
    for one in json.loads((written / "explore.json").read_text())["hyperparameters"]:
        assert f"<tr><td>{one['name']}</td><td>{one['here']['value']:.3g}</td>" in text
    assert text.count("<tr>") == 6
    assert "act on training" in text


def test_all_examples_give_the_loss_that_the_run_recorded(directory, tmp_path, capsys):
    assert explore.main([str(directory), "--points", "3", "--no-pairs", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "explore.json").read_text())
    assert found["loss"] == pytest.approx(found["recorded_loss"], rel=1e-6)
    assert f"{found['recorded_loss']:.4f} on all" in capsys.readouterr().out


def changed(directory, tmp_path, file, change):
    """A copy of the run with one file changed, or removed where ``change`` is None."""
    copy = shutil.copytree(directory, tmp_path / "changed")
    if change is None:
        shutil.rmtree(copy / file) if (copy / file).is_dir() else (copy / file).unlink()
    else:
        (copy / file).write_text(change((copy / file).read_text()))
    return copy


def fails(capsys, arguments, says):
    capsys.readouterr()
    assert explore.main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.count("error: ") == 1
    assert said.err.splitlines()[-1].startswith("error: ")
    assert said.out == ""


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("metrics.jsonl", None, "changed holds no metrics.jsonl"),
        ("metrics.jsonl", lambda text: text[:-30], "is not a row of metrics"),
        ("metrics.jsonl", lambda text: "", "holds no evaluation yet"),
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", lambda text: text + "nonsense: 1\n", "nonsense"),
        (
            "config.yaml",
            lambda text: text.replace("name: stn", "name: fixed"),
            "a run of --method fixed, whose",
        ),
        ("config.yaml", lambda text: text.replace("name: stn", "name: one-pass"), "a run of --method one-pass, whose"),
        ("config.yaml", lambda text: text.replace("recipe: digits", "recipe: mine"), "your own recipe 'mine'"),
        ("config.yaml", lambda text: text.replace("name: stn", "name: delta-stn"), "does not fit this network"),
        ("checkpoints", None, "changed holds no checkpoint"),
        (
            "data.json",
            lambda text: text.replace('"valid": "sha', '"valid": "other'),
            "(different: validation split)",
        ),
        ("data.json", lambda text: text[:9], "is not a fingerprint of a run's data"),
    ],
)
def test_a_run_that_cannot_be_explored_is_one_line_and_status_2(directory, tmp_path, capsys, file, change, says):
    copy = changed(directory, tmp_path, file, change)
    before = contents(copy)
    fails(capsys, [copy, *FEW], says)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--points", "2"], "--points 2: must be from 3 to 1000"),
        (["--points", "many"], "invalid int value: 'many'"),
        (["--span", "1.5"], "--span 1.5: must be from 2 to 20"),
        (["--span", ".nan"], "--span nan: must be from 2"),
        (["--examples", "0"], "--examples 0: must be from 1"),
        (["--device", "tpu"], "device (--device) = 'tpu'"),
        (["--recipe", "digit"], "unknown recipe 'digit'"),
        (["--recipe", "ptb"], "holds a run of the recipe 'digits', not of 'ptb'"),
        (["--pairz"], "did you mean '--pairs'?"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(directory, tmp_path, capsys, arguments, says):
    fails(capsys, [directory, *arguments, "--out", tmp_path / "out"], says)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_and_one_that_cannot_be_written_are_errors(directory, tmp_path, capsys):
    fails(capsys, [tmp_path / "absent"], "there is no run directory")
    fails(capsys, [tmp_path], "holds no metrics.jsonl")
    fails(capsys, [], "required: RUN_DIR")
    (tmp_path / "file").write_text("kept")
    fails(capsys, [directory, *FEW, "--out", tmp_path / "file"], "can't be written")
    fails(capsys, [directory, *FEW, "--out", tmp_path / "file" / "below"], "can't be written")
    (tmp_path / "out" / "explore.json").mkdir(parents=True)
    fails(capsys, [directory, *FEW, "--out", tmp_path / "out"], "has a folder explore.json")
    assert (tmp_path / "file").read_text() == "kept"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["explore.json"]


@pytest.mark.parametrize("recipe", [(), ("--recipe", "digits")])
def test_a_run_of_fit_is_named_and_left_alone(tmp_path, capsys, recipe):
    model = stn.convert(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2)), quiet=True)
    batches = [(torch.randn(5, 3), torch.randint(2, (5,)))]
    sgd = partial(torch.optim.SGD, lr=0.1)
    stn.fit(model, batches, batches, loss=F.cross_entropy, optimizer=sgd, epochs=1, run_dir=tmp_path, quiet=True)
    before = contents(tmp_path)
    fails(capsys, [tmp_path, *recipe], f"{tmp_path} holds a run of stn.fit, whose model, loss and loaders")
    says = f"stn.explore_model(stn.load('{tmp_path}', model), valid_loader, loss=loss)"
    fails(capsys, [tmp_path, *recipe], says)
    assert contents(tmp_path) == before


OWN = """
from dataclasses import replace
from stn_fast.recipes import digits

def config():
    return replace(digits.config(), recipe="mine")

build = digits.build
"""


def test_a_run_of_ones_own_recipe_is_explored_with_it(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    place, path = str(tmp_path / "own.py"), tmp_path / "run"
    assert train.main([place, *SHORT[3:], "--max-steps", "3", "--run-dir", str(path)]) == 0
    assert explore.main([str(path), "--recipe", place, *FEW, "--no-pairs"]) == 0
    assert json.loads((path / "explore.json").read_text())["recipe"] == "mine"


SPACE = HyperparameterSpace(
    [
        Hyperparameter("temporal_activation_regularization", low=0.0, init=0.1),
        Hyperparameter("cutout_holes", low=0, high=20, init=9.5, integer=True),
        Hyperparameter("$x_2$", init=0.0),
    ]
)


def made_up(loss, span=4.0):
    """An exploration of SPACE with the losses ``loss(shift of the first, of the second)``."""
    shifts = [span * k / 10 - span for k in range(21)]

    def point(name, shift):
        location, _ = SPACE.initial_state()
        location[SPACE.index(name)] += shift * 0.5
        values = loss(shift, 0.0) if name != "cutout_holes" else loss(0.0, shift)
        return Point(shift, SPACE.values(location)[name], values)

    curves = []
    for name in SPACE.names:
        ends = {place: point(name, shift) for place, shift in (("low", -2.0), ("here", 0.0), ("high", 2.0))}
        curves.append(Curve(name=name, scale=0.5, points=[point(name, shift) for shift in shifts], slope=0.1, **ends))
    first, second = curves[:2]
    values = tuple([p.value for p in curve.points] for curve in (first, second))
    losses = [[loss(x, y) for x in shifts] for y in shifts]
    return Exploration(0.5, 10, 10, curves, Map((first.name, second.name), (shifts, shifts), values, losses))


def drawn(found, loss_unit="nats"):
    made = figure.draw(found, SPACE, "a title $x", loss_unit)
    assert png(made).startswith(b"\x89PNG")
    return made


@pytest.fixture(scope="module")
def bowls():
    """An exploration whose losses within the bands are 1 to 5, and its picture."""
    found = made_up(lambda x, y: 1 + x**2 + 0.1 * y**2)
    return found, drawn(found)


def test_the_band_and_the_axes_are_those_of_the_hyperparameters(bowls):
    exploration, made = bowls
    first, second, third, contours = made.axes[:4]
    assert [axis.get_xscale() for axis in (first, second, third, contours)] == ["log", "linear", "linear", "log"]
    assert contours.get_yscale() == "linear"
    for axis, found, part in zip((first, second, third), exploration.curves, ("value", "shift", "shift"), strict=True):
        band = axis.patches[0].get_extents().transformed(axis.transData.inverted())
        assert (band.x0, band.x1) == pytest.approx((getattr(found.low, part), getattr(found.high, part)))
        assert axis.get_title("left").replace("\n", " ") == found.name.replace("_", " ")
        assert axis.get_ylim() == pytest.approx((1 - 0.15 * 4, 5 + 0.15 * 4))
    labels = [text.get_text() for text in second.get_xticklabels()]
    assert labels == [f"{int(label)}" for label in labels]
    assert first.get_ylabel() == "validation loss (nats)"


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: 0.25,
        lambda x, y: float("nan"),
        lambda x, y: float("inf") if x > 1 else -(10.0 ** (9 * abs(x))),
    ],
    ids=["constant", "nan", "huge, negative and infinite"],
)
def test_any_losses_can_be_drawn(loss, recwarn):
    drawn(made_up(loss), loss_unit="")
    assert not recwarn.list


def test_texts_of_the_picture_do_not_overlap(bowls):
    _, made = bowls
    boxes = [text.get_window_extent() for text in [*made.texts, *made.legends]]
    for axis in made.axes[:4]:
        titles = [axis.title, axis._left_title, axis._right_title]
        boxes += [title.get_window_extent() for title in titles if title.get_text()]
        ticks = [tick.get_window_extent() for tick in axis.get_xticklabels() if tick.get_text()]
        low, high = axis.get_window_extent().x0, axis.get_window_extent().x1
        boxes += [tick for tick in ticks if low - 1 <= (tick.x0 + tick.x1) / 2 <= high + 1]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
