"""python -m stn_fast.plot: every panel drawn and labelled, every error one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from stn_fast import plot
from stn_fast.recipes import digits
from stn_fast.training.layering import resolve
from stn_fast.training.run import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories of a self-tuning run and one with fixed hyperparameters."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("stn", "fixed"):
        pairs = [f"method.name={name}", "schedule.epochs=4", "method.warmup_epochs=1", f"run_dir={root / name}"]
        run(resolve(digits.config(), None, pairs), digits.build)
    return [root / "stn", root / "fixed"]


def visible(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


@pytest.mark.parametrize("count", [1, 2])
def test_every_hyperparameter_and_every_loss_is_drawn_for_every_run(runs, count):
    figure = plot.draw([plot.read_run(directory) for directory in runs[:count]])
    losses, *panels = visible(figure)
    assert losses.get_title("left") == "loss"
    assert losses.get_ylabel() == "nats"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["train (regularised)", "valid", "test"]
    names = [name.replace("_", " ") for name in digits.config().hyperparameters]
    assert [panel.get_title("left") for panel in panels] == names
    for panel in panels:
        curves = [line for line in panel.get_lines() if len(line.get_xdata()) == 5]
        assert len(curves) == count
        assert len(panel.collections) == count
    assert "epoch" in {panel.get_xlabel() for panel in panels}


def test_the_band_is_one_scale_wide_on_either_side(runs):
    row = plot.read_run(runs[0]).rows["eval"][0]
    for name, value in row["hyperparameters"].items():
        assert row["hyperparameters_low"][name] < value < row["hyperparameters_high"][name]
    fixed = plot.read_run(runs[1]).rows["eval"][0]
    assert fixed["hyperparameters_low"] == fixed["hyperparameters"] == fixed["hyperparameters_high"]


def test_what_spans_decades_has_a_logarithmic_axis(runs):
    figure = plot.draw([plot.read_run(runs[0])])
    scales = {axis.get_title("left"): axis.get_yscale() for axis in visible(figure)}
    assert scales["weight decay"] == scales["loss"] == "log"
    assert scales["input dropout"] == "linear"


def test_several_runs_have_a_legend_of_their_names(runs):
    figure = plot.draw([plot.read_run(directory) for directory in runs])
    (legend,) = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["stn", "fixed"]


def renamed(run, name, other):
    """``run`` as if its hyperparameter ``name`` were called ``other``."""
    entries = {other if key == name else key: value for key, value in run.config.hyperparameters.items()}
    for row in run.rows["eval"]:
        for part in ("hyperparameters", "hyperparameters_low", "hyperparameters_high"):
            row[part][other] = row[part].pop(name)
    return run._replace(config=dataclasses.replace(run.config, hyperparameters=entries))


def only(run, name):
    """``run`` as if it had one hyperparameter."""
    return run._replace(
        config=dataclasses.replace(run.config, hyperparameters={name: run.config.hyperparameters[name]})
    )


@pytest.mark.parametrize("count", [1, 2])
def test_titles_do_not_overlap(runs, count):
    long = "temporal_activation_regularization"
    figure = plot.draw([renamed(plot.read_run(directory), "weight_decay", long) for directory in runs[:count]])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in [*figure.texts, *figure.legends]]
    for axis in visible(figure):
        titles = [axis.title, axis._left_title, axis._right_title]
        boxes += [title.get_window_extent() for title in titles if title.get_text()]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_the_command_writes_a_picture(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plot.main([str(runs[0])]) == 0
    assert (runs[0] / "schedule.png").stat().st_size > 10_000
    assert plot.main([*map(str, runs)]) == 0
    assert (tmp_path / "schedules.png").stat().st_size > 10_000
    assert plot.main([*map(str, runs), "--output", str(tmp_path / "both.svg")]) == 0
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.splitlines()[1] == "schedules.png"


def test_errors_are_one_line_and_status_2(runs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "metrics.jsonl").write_text('{"phase": "ev')
    early = tmp_path / "early"
    early.mkdir()
    (early / "metrics.jsonl").write_text("")
    for arguments, says in [
        ([str(tmp_path / "absent")], "there is no run directory"),
        ([str(empty)], "holds no metrics.jsonl"),
        ([str(torn)], "line 1 of"),
        ([str(early)], "no evaluation yet"),
        ([str(runs[0]), "--output", str(tmp_path / "absent" / "x.png")], "cannot be written"),
        ([str(runs[0]), "--output", str(tmp_path / "x.mp3")], "cannot be written"),
        ([], "required: RUN_DIR"),
        ([str(runs[0]), "--outptu", "x"], "--outptu"),
    ]:
        assert plot.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1


def test_a_hyperparameter_that_a_run_left_out_has_no_panel(tmp_path):
    left_out = "hyperparameters.input_noise.enabled=false"
    run(resolve(digits.config(), None, [left_out, "schedule.max_steps=2", f"run_dir={tmp_path}"]), digits.build)
    titles = [panel.get_title("left") for panel in visible(plot.draw([plot.read_run(tmp_path)]))]
    assert "input noise" not in titles
    assert "weight decay" in titles


def test_plot_reads_and_writes_below_home(runs, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(runs[0], home / "run")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert plot.main(["~/run"]) == 0
    assert (home / "run" / "schedule.png").exists()
    assert plot.main(["~/run", "-o", "~/picture.svg"]) == 0
    assert (home / "picture.svg").exists()
    assert list(here.iterdir()) == []


def test_a_picture_without_an_ending_is_the_png_that_is_named(runs, tmp_path, capsys):
    assert plot.main([str(runs[0]), "-o", str(tmp_path / "picture")]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes().startswith(b"\x89PNG")


def test_of_several_directories_those_that_can_be_are_drawn_and_the_others_named(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absent = tmp_path / "ab\nsent"
    assert plot.main([str(absent), str(runs[0]), str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == "schedules.png\n"
    assert [line[:9] for line in said.err.splitlines()] == ["warning: "] * 2
    assert "ab\\nsent" in said.err
    Path("schedules.png").unlink()
    assert plot.main([str(absent), str(tmp_path)]) == 2
    assert "error: none of the 2 directories" in capsys.readouterr().err
    assert not Path("schedules.png").exists()


DRAW = """
import os, sys
from stn_fast.plot import save_schedule
for picture in sys.argv[2:]:
    save_schedule(sys.argv[1:2], picture)
assert os.environ["MPLBACKEND"] == {backend!r}
import matplotlib
print(matplotlib.rcParams._get("backend"))
"""


@pytest.mark.parametrize("backend", ["module://not_installed.backend", "", "pdf"])
def test_the_backend_that_the_environment_names_does_not_matter(runs, tmp_path, backend):
    environment = os.environ | {"MPLBACKEND": backend}
    pictures = [tmp_path / "x.png", tmp_path / "x.svg"]
    command = [sys.executable, "-c", DRAW.format(backend=backend), str(runs[0]), *map(str, pictures)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    if backend == "pdf":
        assert done.stdout == "pdf\n"  # pyplot, if somebody uses it next, has the one that was asked for


ODD = ["$x^2$", "$\\frac{1}$", "a $ b $ c_{", "_hidden", "a\nb", "\x1b[31mred", "\udcff", "a/b", "%s {} \\"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("count", [1, 2])
def test_a_name_is_drawn_as_text(runs, tmp_path, name, count):
    read = [only(renamed(plot.read_run(directory), "weight_decay", name), name) for directory in runs[:count]]
    read = [run._replace(name=name, config=dataclasses.replace(run.config, recipe=name)) for run in read]
    figure = plot.draw(read)
    with matplotlib.rc_context({"text.usetex": True}):
        plot.save(figure, tmp_path / "picture.svg")
    shown = [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible()]
    panel = visible(figure)[-1]
    assert "".join(panel.get_title("left").split()) == "".join(plot.printable(name).replace("_", " ").split())
    heads = [text for text in shown if text.startswith(plot.printable(name))]
    assert len(heads) >= count
    assert all(text.isprintable() for text in heads)


def test_a_run_whose_name_begins_with_an_underscore_has_its_place_in_the_legend(runs, recwarn):
    figure = plot.draw([plot.read_run(directory)._replace(name=f"_{i}") for i, directory in enumerate(runs)])
    (legend,) = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["_0", "_1"]
    assert not recwarn.list


@pytest.mark.parametrize("unit", ["", "mV²", "$x$"])
def test_a_loss_is_labelled_with_the_tasks_unit_and_may_be_negative(tmp_path, unit):
    def build(config):
        return dataclasses.replace(digits.build(config), loss_unit=unit)

    run(resolve(digits.config(), None, ["schedule.max_steps=2", f"run_dir={tmp_path}"]), build)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = plot.draw([plot.read_run(tmp_path)]).axes[0]
    assert losses.get_ylabel() == unit
    assert losses.get_yscale() == "log"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row | {"loss": -row["loss"]}) + "\n" for row in rows))
    figure = plot.draw([plot.read_run(tmp_path)])
    assert figure.axes[0].get_yscale() == "linear"
    plot.save(figure, tmp_path / "picture.png")
