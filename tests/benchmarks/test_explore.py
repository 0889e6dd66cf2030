"""The benchmark that compares predictions of the response with networks trained there: its rows and its table."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import explore
from stn_fast.comparison.runs import METHODS
from stn_fast.recipes import recipe
from stn_fast.training.config import HyperparameterConfig

QUICK = ["digits", "--epochs", "1", "--seeds", "1", "--trained", "2", "--set", "method.warmup_epochs=0"]


def test_a_row_has_the_prediction_and_the_losses_of_a_network_trained_there(tmp_path, capsys, monkeypatch):
    trained = []

    def measured(configs, jobs):
        trained.extend(configs)
        return of_benchmark(configs, jobs)

    of_benchmark = explore.measured
    monkeypatch.setattr(explore, "measured", measured)
    out = tmp_path / "rows.jsonl"
    assert explore.main([*QUICK, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["at"], row["trained_seed"]) for row in rows] == [(at, seed) for at in (-2, 0, 2) for seed in (0, 1)]
    name = rows[0]["hyperparameter"]
    for row, config in zip(rows, trained, strict=True):
        assert config.method.name == METHODS["fixed"]["name"]
        assert (config.seed, config.schedule.epochs) == (row["trained_seed"], 1)
        assert {key: entry.init for key, entry in config.enabled.items()} == row["hyperparameters"]
        assert row["best_loss"] <= row["end_loss"]
        others = {key: value for key, value in row["hyperparameters"].items() if key != name}
        assert others == {key: value for key, value in rows[2]["hyperparameters"].items() if key != name}
    values = [row["value"] for row in rows[::2]]
    assert values == sorted(values)
    assert len({row["end_loss"] for row in rows}) == len(rows)
    assert all(f"{row['predicted']:.4f}" in table for row in rows)
    monkeypatch.setattr(explore, "measured", lambda configs, jobs: pytest.fail("a row in the file was made again"))
    assert explore.main([*QUICK, "--out", str(out)]) == 0


def test_an_integer_is_fixed_in_the_middle_of_the_values_that_round_down_to_it():
    config = recipe("digits").config()
    holes = HyperparameterConfig(init=1.5, low=0.0, high=4.0, integer=True)
    config = replace(config, hyperparameters={**config.hyperparameters, "holes": holes})
    values = dict.fromkeys(config.enabled, 0.25) | {"holes": 3.0}
    fixed = explore.fixed_at(values, config)
    assert fixed.enabled["holes"].init == 3.5
    assert fixed.enabled["input_noise"].init == 0.25


def test_networks_that_became_non_finite_have_no_losses_in_the_table():
    row = {"seed": 0, "at": -2.0, "hyperparameter": "a", "value": 0.1, "predicted": 0.5}
    said = explore.table([{**row, "end_loss": None, "best_loss": None}, {**row, "end_loss": 1.0, "best_loss": 1.0}])
    assert said.splitlines()[1].split() == ["0", "a", "-2σ", "0.1", "0.5000", "-", "-"]


@pytest.mark.parametrize("flag", ["--seeds", "--trained", "--jobs"])
def test_wrong_flags_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        explore.main(["digits", flag, "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_the_table_of_the_docs_holds_what_was_recorded():
    root = Path(__file__).parent.parent.parent
    lines = (root / "benchmarks" / "results" / "explore.jsonl").read_text().splitlines()
    groups: dict = {}
    for row in map(json.loads, lines):
        groups.setdefault((row["recipe"], row["seed"], row["hyperparameter"].replace("_", " "), row["at"]), []).append(
            row
        )
    page = (root / "docs" / "hypergradients.md").read_text()
    found = re.findall(r"\| (\S+), seed (\d), (.+), λ( [+-] 2σ)? \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", page)
    assert len(found) == len(groups) == 12
    for name, seed, hyperparameter, shift, *numbers in found:
        rows = groups[name, int(seed), hyperparameter, float(shift.replace(" ", "").replace("σ", "") or 0)]
        assert len(rows) == 3
        losses = [statistics.mean(row[key] for row in rows) for key in ("predicted", "end_loss", "best_loss")]
        assert numbers == [f"{rows[0]['value']:.2g}", *(f"{loss:.4f}" for loss in losses)]
