"""A run directory belongs to the data that its run was trained on: it gives no result and goes on with no others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_files import Warnings, result, rows
from torch.utils.data import TensorDataset

import stn_fast as stn
from stn_fast import train as command
from stn_fast.data import DataSet, Split, from_dataset
from stn_fast.errors import UserError
from stn_fast.models import mlp
from stn_fast.recipes import digits
from stn_fast.training import checkpoint, task
from stn_fast.training.run import run

CURE = r"choose another --run-dir, name the run's data with --data-root, or start over with --no-resume"


def other_images(data):
    """One pixel of the first example is another."""
    inputs = data.train.inputs.clone()
    inputs[0, 0] += 1 / 16
    return data._replace(train=data.train._replace(inputs=inputs))


def other_labels(data):
    return data._replace(train=data.train._replace(targets=data.train.targets.flip(0)))


def other_validation_split(data):
    """The same examples in all, but one of those to tune on is one of those to test on."""
    whole = [torch.cat([valid, test]).roll(-1, 0) for valid, test in zip(data.valid, data.test, strict=True)]
    count = data.valid.examples
    return data._replace(valid=Split(*(part[:count] for part in whole)), test=Split(*(part[count:] for part in whole)))


def digits_with(change):
    """What builds the digits task with ``change``d data."""

    def build(config):
        whole = digits.build(config)
        return replace(whole, data=change(whole.data))

    return build


CHANGES = [
    (other_images, "training split"),
    (other_labels, "training split"),
    (other_validation_split, "validation split, test split"),
]


@pytest.mark.parametrize("steps", ["schedule.max_steps=null", "schedule.max_steps=20"])
@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_other_data_are_refused_and_the_run_is_left_as_it_was(make_config, train, steps, change, says):
    directory = train("schedule.max_steps=20")
    before = {file: file.read_bytes() for file in directory.glob("*.*") if file.is_file()}
    with pytest.raises(UserError, match=rf"run holds a run on other data \(different: {says}\): {CURE}"):
        run(make_config(steps), digits_with(change))
    assert {file: file.read_bytes() for file in directory.glob("*.*") if file.is_file()} == before


def test_other_data_start_over_without_resuming(make_config, train, same_run):
    train()
    config = make_config()
    run(config, digits_with(other_labels), resume=False)
    fresh = make_config(name="fresh")
    run(fresh, digits_with(other_labels))
    same_run(Path(config.directory), Path(fresh.directory))
    with pytest.raises(UserError, match="different: training split"):
        run(config, digits.build)


def test_a_run_of_one_s_own_data_set_is_refused_another(make_config, tmp_path):
    images, labels = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8), torch.arange(60) % 3

    def build_with(images):
        def build(config):
            space = stn.HyperparameterSpace([stn.Hyperparameter("hidden_dropout_1", low=0.0, high=0.9, init=0.3)])
            inputs, targets = from_dataset(TensorDataset(images, labels))
            examples = Split(inputs.flatten(1).float(), targets)
            return task.Task(
                space=space,
                model=mlp(space, (16, 8, 3)),
                data=DataSet(*(Split(*(part[i::3] for part in examples)) for i in range(3))),
                training_objective=task.decayed_classification_loss,
                validation_objective=task.classification_loss,
                scores=task.classification_scores,
            )

        return build

    config = make_config("schedule.batch_size=20", "schedule.valid_batch_size=20", "schedule.max_steps=4")
    before = run(config, build_with(images))
    assert run(config, build_with(images.clone())) == before
    darker = images.clone()
    darker[2::3] //= 2
    with pytest.raises(UserError, match=r"\(different: test split\)"):
        run(config, build_with(darker))


def test_a_run_from_before_fingerprints_goes_on_with_a_warning_and_has_one_from_then_on(make_config, train, same_run):
    whole = train(name="whole")
    directory = train("schedule.max_steps=20")
    (directory / "data.json").unlink()
    first, second = Warnings(), Warnings()
    run(make_config(), digits.build, progress=first)
    assert first.warnings == [f"{directory} has no data.json: cannot check whether it was trained on these data"]
    same_run(whole, directory)
    run(make_config(), digits.build, progress=second)
    assert second.warnings == []
    with pytest.raises(UserError, match="different: training split"):
        run(make_config(), digits_with(other_images))


def test_a_finished_run_from_before_fingerprints_says_that_its_data_are_unknown(make_config, train):
    directory = train()
    (directory / "data.json").unlink()
    progress = Warnings()
    run(make_config(), digits_with(other_images), progress=progress)
    assert "cannot check" in progress.warnings[0]
    assert not (directory / "data.json").exists()  # a guess is not recorded


@pytest.mark.parametrize("contents", ["", "[1", "3"])
def test_the_error_for_a_damaged_fingerprint_names_the_file_and_what_to_do(train, contents):
    directory = train("schedule.max_steps=3")
    (directory / "data.json").write_text(contents)
    with pytest.raises(UserError, match=r"run/data.json is not a fingerprint .*restore it.*--no-resume"):
        train()
    train("schedule.max_steps=3", resume=False)
    assert set(json.loads((directory / "data.json").read_text())) == {"train", "valid", "test"}


TEXT = [
    "text", "--max-steps", "6", "--set", "text.width=8", "--set", "text.window=10", "--set", "schedule.batch_size=4",
    "--set", "schedule.valid_batch_size=4",
]  # fmt: skip


def write_texts(folder, words):
    """Three texts in one pattern: its words are the ``words``."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, lines in (("train", 100), ("valid", 30), ("test", 30)):
        chosen = torch.randint(len(words), (lines, 8), generator=generator).tolist()
        text = "\n".join(" ".join(words[i] for i in line) for line in chosen)
        (folder / f"{name}.txt").write_text(text + "\n")
    return folder


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """texts(root, *arguments): the exit status of the recipe ``text`` on one text in its default run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "cache"))
    for name, words in (("colours", ["red", "green", "blue"]), ("numbers", ["one", "two", "three"])):
        write_texts(tmp_path / name, words)
    return lambda root, *arguments: command.main([*TEXT, "--data-root", root, *arguments])


@pytest.mark.parametrize("more", [[], ["--max-steps", "9"]], ids=["finished", "unfinished"])
def test_another_text_of_the_same_sizes_is_status_2_in_one_line(texts, capsys, more):
    assert texts("colours") == 0
    before = rows(Path("runs/text-stn-seed0"))
    capsys.readouterr()
    assert texts("numbers", *more) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "runs/text-stn-seed0 holds a run on other data (different: vocabulary): choose another --run-dir" in said.err
    assert rows(Path("runs/text-stn-seed0")) == before


@pytest.mark.parametrize("more", [[], ["--max-steps", "9"]], ids=["finished", "unfinished"])
def test_data_that_are_gone_are_status_2_in_one_line(texts, capsys, more):
    assert texts("colours") == 0
    shutil.rmtree("colours")
    capsys.readouterr()
    assert texts("colours", *more) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: there is no file colours/train.txt")
    assert said.err.count("\n") == 1


def test_the_same_files_elsewhere_are_the_same_data(texts, capsys):
    assert texts("colours") == 0
    shutil.move("colours", "moved")
    assert texts("moved") == 0
    assert "is finished" in capsys.readouterr().err
    assert texts("moved", "--max-steps", "9") == 0
    assert "resuming runs/text-stn-seed0 after step 6" in capsys.readouterr().err
    assert result(Path("runs/text-stn-seed0"))["steps"] == 9


def test_one_line_more_of_the_validation_text_is_named(texts, capsys):
    assert texts("colours") == 0
    with Path("colours/valid.txt").open("a") as file:
        file.write("red\n")
    assert texts("colours") == 2
    assert "(different: validation split)" in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_stays_that_of_its_data(texts, capsys):
    assert texts("colours") == 0
    checkpoint.clear(Path("runs/text-stn-seed0/checkpoints"))
    assert texts("colours") == 0  # it is finished
    assert texts("numbers") == 2
    assert "holds a run on other data" in capsys.readouterr().err
