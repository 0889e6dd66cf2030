"""A trainer in the state of a run's checkpoint: which checkpoint, which data, and texts."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from run_files import rows

from stn_fast.errors import UserError
from stn_fast.exploration.response import explored
from stn_fast.exploration.restoring import restored
from stn_fast.recipes import digits, recipe
from stn_fast.training import checkpoint
from stn_fast.training.layering import resolve
from stn_fast.training.run import run

STN = "method.name=stn"
TEXT = (
    "schedule.max_steps=8", "schedule.batch_size=4", "schedule.valid_batch_size=4", "text.width=8", "text.window=10",
    "text.valid_streams=3",
)  # fmt: skip


def test_without_a_fingerprint_of_the_data_there_is_a_warning(digits_run, tmp_path):
    directory, config = digits_run(STN)
    copy, warned = shutil.copytree(directory, tmp_path / "copy"), []
    (copy / "data.json").unlink()
    restored(copy, config, digits.build, warned.append)
    assert warned == [f"{copy} has no data.json: cannot check whether it was trained on these data"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(digits_run, tmp_path):
    directory, config = digits_run(STN)
    copy, warned = shutil.copytree(directory, tmp_path / "copy"), []
    *others, newest = checkpoint.steps(copy / "checkpoints")
    broken = checkpoint.path_of(copy / "checkpoints", newest) / checkpoint.STATE
    broken.write_bytes(b"x")
    assert restored(copy, config, digits.build, warned.append).step == others[-1]
    assert warned[0].startswith(f"{broken} is damaged")
    for other in others:
        (checkpoint.path_of(copy / "checkpoints", other) / checkpoint.STATE).write_bytes(b"x")
    with pytest.raises(UserError, match="every checkpoint under"):
        restored(copy, config, digits.build, warned.append)


def test_the_best_checkpoint_is_the_one_that_the_result_names_and_its_damage_is_explained(digits_run, tmp_path):
    directory, config = digits_run(STN)
    copy = shutil.copytree(directory, tmp_path / "copy")
    steps = checkpoint.steps(copy / "checkpoints")
    found = json.loads((copy / "result.json").read_text())
    other = next(step for step in steps[:-1] if step != found["best_step"])
    (copy / "result.json").write_text(json.dumps(found | {"best_step": other}))
    assert restored(copy, config, digits.build, pytest.fail, best=True).step == other
    assert restored(copy, config, digits.build, pytest.fail).step == steps[-1]
    (checkpoint.path_of(copy / "checkpoints", other) / checkpoint.STATE).write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"the best checkpoint is lost: .* is damaged .*without --best.* run the training"
    ):
        restored(copy, config, digits.build, pytest.fail, best=True)


def write_texts(folder):
    words, generator = ("red", "green", "blue"), torch.Generator().manual_seed(0)
    for name, lines in (("train", 100), ("valid", 41), ("test", 30)):
        chosen = torch.randint(len(words), (lines, 8), generator=generator).tolist()
        (folder / f"{name}.txt").write_text("\n".join(" ".join(words[i] for i in line) for line in chosen) + "\n")


def test_a_text_keeps_its_state_from_one_window_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path)
    path, build = tmp_path / "run", recipe("text").build
    config = replace(resolve(recipe("text").config(), None, TEXT), run_dir=str(path), data_root=str(tmp_path))
    run(config, build)
    recorded = rows(path)[-1]["loss"]
    curves = []
    for size in (90, 5000):  # five windows of up to 30 words in each of three columns, and one window
        sized = replace(config, schedule=replace(config.schedule, eval_batch_size=size))
        trainer = restored(path, sized, build, pytest.fail)
        found = explored(trainer, points=3, pairs=False)
        assert found.loss == pytest.approx(recorded, rel=1e-6)
        curves.append({curve.name: [point.loss for point in curve.points] for curve in found.curves})
    assert curves[0].keys() == config.enabled.keys()
    for name, losses in curves[0].items():
        assert losses == pytest.approx(curves[1][name], rel=1e-6)
    first = explored(trainer, points=3, examples=50, pairs=False)
    assert first.examples == 50
    words = trainer.task.data.valid
    alone = trainer.evaluate(words._replace(inputs=words.inputs[:50], targets=words.targets[:50]))
    assert first.loss == pytest.approx(alone["loss"], rel=1e-6)
