"""The command that compares ranks keeps its rows, goes on where it stopped, and varies what it says it does."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from random_response import respond

import stn_fast as stn
from benchmarks import response_rank

FLAGS = argparse.Namespace(data_root=None, epochs=1)


def test_a_run_that_has_a_row_is_not_made_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = ["digits", "--epochs", "1", "--seeds", "1", "--out", str(out), "--variants", "full", "rank-4"]
    assert response_rank.main(arguments) == 0
    before = out.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [("full", 0), ("rank-4", 0)]
    assert rows[0]["valid_loss"] != rows[1]["valid_loss"]

    measured = []
    monkeypatch.setattr(
        response_rank, "measure", lambda config, build: measured.append(config) or {"diverged": "never"}
    )
    assert response_rank.main(arguments) == 0
    assert not measured
    assert out.read_text() == before
    assert response_rank.main([*arguments[:4], "2", *arguments[5:]]) == 0
    assert [config.seed for config in measured] == [1, 1]
    printed = capsys.readouterr().out
    assert f"{rows[0]['valid_loss']:.4f}" in printed
    assert "inf" in printed  # of the runs that did not end


def test_variants_change_what_their_names_say():
    def of(variant, recipe="digits"):
        return response_rank.configure(recipe, variant, 3, Path("runs"), FLAGS)

    full = of("full")
    assert of("rank-16").method.response_rank == 16
    assert of("auto").method.response_rank == "auto"
    assert (full.method.response_rank, full.seed, full.schedule.epochs) == (None, 3, 1)
    assert of("frozen").method.freeze
    assert (of("cycle-5").method.train_steps, of("cycle-5").method.response_rank) == (5, 16)
    assert of("half-batch").schedule.valid_batch_size == full.schedule.valid_batch_size // 2


def test_factors_are_dropped_too_where_asked():
    space = stn.HyperparameterSpace([stn.Hyperparameter("drop", low=0.0, high=0.9, init=0.5, per_example=False)])
    model = torch.nn.Sequential(stn.DropConnectLSTM(20, 24))
    respond(stn.convert(model, space, dropouts={"0": "drop"}, response_rank=4, quiet=True))
    response_rank._drop_factors(model)
    hyper = space.at(space.initial_state()[0], batch_size=2)
    with model.tuned_hyperparameters.using(hyper):
        weights = model[0]._connected("l0", hyper)
    for dropped in (weights.weight, weights.response_weight, weights.response_projection):
        assert 0.2 < (dropped == 0).float().mean() < 0.8
    of_w, of_a, of_b = ((dropped == 0).flatten()[:96] for dropped in weights[::2][:2] + weights[6:])
    assert not torch.equal(of_w, of_a)
    assert not torch.equal(of_w, of_b)
    model.eval()
    with model.tuned_hyperparameters.using(hyper):
        kept = model[0]._connected("l0", hyper)
    assert all((one != 0).all() for one in (kept.weight, kept.response_weight, kept.response_projection))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digits", "--seeds", "0"], "--seeds must be at least 1"),
        (
            ["digits", "--seeds", "1", "--epochs", "1", "--variants", "factors-dropped"],
            "factors-dropped is for a recipe",
        ),
        (["digits", "--out", "bad.jsonl"], "a line is not JSON"),
        (["digits", "--out", "other.jsonl"], "holds other things than rows"),
        (["digits", "--out", "absent/rows.jsonl"], "--out absent/rows.jsonl can't be written"),
        (["no-recipe"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_named(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("not a row\n")
    Path("other.jsonl").write_text('{"seed": 0}\n')
    with pytest.raises(SystemExit):
        response_rank.main(arguments)
    assert says in capsys.readouterr().err
