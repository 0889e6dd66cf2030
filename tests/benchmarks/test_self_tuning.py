"""The evidence command: its table, its ratio, and how it counts runs that turn non-finite."""

import json

from benchmarks import self_tuning


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
