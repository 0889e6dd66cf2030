"""python -m stn_fast.plot: every panel drawn and labelled, every error one line."""

import dataclasses

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
