"""The evidence command: its table, its ratio, and how it counts runs that turn non-finite."""

import json
import math

import pytest
from in_turn import InTurn

from benchmarks import self_tuning
from stn_fast.comparison import processes
from stn_fast.recipes import recipe


def test_it_prints_every_run_the_medians_and_the_ratio(tmp_path, capsys):
    file = tmp_path / "evidence.json"
    arguments = ["digits", "--seeds", "2", "--epochs", "4", "--methods", "stn", "fixed", "--json", str(file)]
    assert self_tuning.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("seed  0") == said.count("seed  1") == 2
    assert said.count("median  ") == 2
    assert "median of stn / median of fixed" in said
    results = json.loads(file.read_text())
    assert {result["method"] for runs in results.values() for result in runs} == {"stn", "fixed"}
    assert all(result["moved"] == 0 for result in results["fixed"])


def test_it_counts_runs_that_turn_non_finite(capsys):
    assert self_tuning.main(["--seeds", "1", "--epochs", "4", "--methods", "stn", "--learning-rate-factor", "1e8"]) == 0
    said = capsys.readouterr().out
    assert "not finite" in said
    assert "1 of 1 runs turned non-finite" in said


def test_guesses_start_every_dropout_rate_there_and_nothing_else():
    defaults = recipe("digits").config()
    before, after = defaults.hyperparameters, self_tuning.guessed(defaults, 0.7).hyperparameters
    changed = {name: entry.init for name, entry in after.items() if entry != before[name]}
    assert changed == {"input_dropout": 0.7, "hidden_dropout_1": 0.7, "hidden_dropout_2": 0.7}
    assert self_tuning.guessed(defaults, None) == defaults


def test_published_settings_are_those_of_the_runs_where_asked(monkeypatch):
    made = []
    monkeypatch.setattr(self_tuning, "compare", lambda flags, defaults: made.append(defaults) or {})
    for flags in ([], ["--as-published"]):
        assert self_tuning.main(["ptb-small", *flags]) == 0
    kept = [(d.method.antithetic, d.method.response_start, d.hyper_optimizer.beta2) for d in made]
    assert kept == [(True, "zero", 0.9), (False, "published", 0.999)]


def test_any_key_of_the_recipe_can_be_set_and_a_wrong_one_is_refused(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(self_tuning, "compare", lambda flags, defaults: made.append(defaults) or {})
    assert self_tuning.main(["digits", "--as-published", "--set", "method.antithetic=true"]) == 0
    assert (made[0].method.antithetic, made[0].method.response_start) == (True, "published")
    with pytest.raises(SystemExit):
        self_tuning.main(["digits", "--set", "method.antithetical=true"])
    assert "antithetic" in capsys.readouterr().err


def test_runs_that_are_sent_to_processes_give_what_runs_here_give(tmp_path, capsys, monkeypatch):
    sent, found = InTurn(), []
    monkeypatch.setattr(processes, "Processes", sent)
    for jobs in ("1", "2"):
        file = tmp_path / f"{jobs}.json"
        arguments = ["--seeds", "1", "--epochs", "4", "--methods", "stn", "fixed", "--guesses", ".2", ".6"]
        assert self_tuning.main([*arguments, "--jobs", jobs, "--json", str(file)]) == 0
        found.append(json.loads(file.read_text()))
    said = capsys.readouterr().out
    for guess in ("0.2", "0.6"):
        for loss in ("best validation loss", "test loss there"):
            assert said.count(f"from dropout {guess}: {loss}, median of stn / median of fixed: ") == 2
    key = ("seed", "guess", "valid_loss", "test_loss", "hyperparameters")
    in_turn, at_once = ([[[row[k] for k in key] for row in rows] for rows in each.values()] for each in found)
    assert in_turn == at_once
    assert (sent.jobs, len(sent.calls)) == (2, 4)
    assert [row["guess"] for row in found[0]["stn"]] == [0.2, 0.6]
    assert found[0]["stn"][0]["hyperparameters_start"]["input_dropout"] == pytest.approx(0.2)


def test_finished_runs_are_kept_and_not_made_again(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    arguments = ["--epochs", "2", "--methods", "one-pass", "fixed", "--out", str(file)]
    assert self_tuning.main([*arguments, "--seeds", "1"]) == 0
    assert "run 2 of 2 finished: fixed-seed0" in capsys.readouterr().out
    first = file.read_text()
    assert self_tuning.main([*arguments, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert "run 2 of 2 finished: fixed-seed1" in said
    assert file.read_text().startswith(first)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("one-pass", 0),
        ("fixed", 0),
        ("one-pass", 1),
        ("fixed", 1),
    ]
    ends = [row["hyperparameters_end"]["optimizer.momentum"] for row in rows[::2]]
    assert f"{min(ends):.4g} to {max(ends):.4g}  optimizer.momentum" in said
    complete = file.read_text()
    for left in (complete[:-1], complete + '{"recipe": "di'):  # without the last line's end, and with half a line more
        file.write_text(left)
        assert self_tuning.main([*arguments, "--seeds", "2"]) == 0
        assert "finished" not in capsys.readouterr().out
        assert file.read_text() == complete
    not_rows, not_json = "holds other things than rows of this command", "a line is not JSON"
    for foreign, says in (("[]\n", not_rows), ("hello", not_json), ('[1,\n{"a": 2', not_json)):
        file.write_text(foreign)
        with pytest.raises(SystemExit):
            self_tuning.main([*arguments, "--seeds", "1"])
        assert says in capsys.readouterr().err
        assert file.read_text() == foreign


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--jobs", "0"], "--jobs"),
        (["--seeds", "0"], "--seeds"),
        (["--guesses", "0.95"], "init = 0.95"),
        (["--json", "absent/rows.json"], "--json absent/rows.json can't be written"),
    ],
)
def test_wrong_arguments_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        self_tuning.main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_perplexity_beyond_a_float_counts_as_infinite():
    runs = [
        {"seed": seed, "diverged": None, "test_perplexity": value, "valid_perplexity": 2.0, "moved": 0}
        for seed, value in enumerate([None, None, 3.0])
    ]
    assert self_tuning.median_score(runs, "test_perplexity") == math.inf
    assert "inf" in self_tuning.table("stn", [run | {"wall_seconds": 1.0} for run in runs])
