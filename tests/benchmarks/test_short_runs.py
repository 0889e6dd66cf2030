"""The command that counts short runs that become non-finite."""

import json
from dataclasses import replace

import pytest
import torch
from in_turn import InTurn

from benchmarks import short_runs
from stn_fast.comparison import processes


@pytest.mark.parametrize("name", short_runs.TASKS)
def test_every_task_trains_tunes_and_depends_on_its_seed(name, monkeypatch):
    monkeypatch.setattr(short_runs, "WARMUP", 1)
    about = {"task": name, "method": "stn", "cycles": 3, "as_published": False}
    rows = [short_runs.one_run({**about, "seed": seed}) for seed in (0, 1)]
    assert all(row["diverged"] is None for row in rows)
    assert rows[0]["last_loss"] != rows[1]["last_loss"]
    assert rows[0]["moved"] > 0, "a hyperparameter stayed where it was"


def test_a_run_that_becomes_non_finite_is_counted_kept_and_fails_the_command(tmp_path, monkeypatch, capsys):
    def explodes(seed):
        def loss(model, batch, hyper):
            right = problem.training(model, batch, hyper)
            return right * torch.inf if seed == 1 else right

        problem = short_runs.one_output(seed)
        return replace(problem, training=loss)

    monkeypatch.setattr(short_runs, "TASKS", {"one-output": explodes, "wine": short_runs.without})
    out = tmp_path / "rows.jsonl"
    arguments = ["--seeds", "2", "--cycles", "2", "--out", str(out)]
    assert short_runs.main(arguments) == 1
    said = capsys.readouterr().out
    assert "1 of 4 runs became non-finite" in said
    assert "one-output, seed 1: " in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["diverged"] is None for row in rows] == [True, True, False, True]
    monkeypatch.setattr(short_runs, "one_run", lambda about: pytest.fail("made again"))
    assert short_runs.main(arguments) == 1
    assert short_runs.main([*arguments, "--tasks", "wine"]) == 0


def test_runs_that_are_sent_to_processes_give_what_runs_here_give(tmp_path, monkeypatch):
    sent, made = InTurn(), []
    monkeypatch.setattr(processes, "Processes", sent)
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        flags = ["--seeds", "2", "--cycles", "2", "--tasks", "without", "one-output", "--method", "delta-stn"]
        assert short_runs.main([*flags, "--jobs", jobs, "--out", str(out)]) == 0
        made.append(out.read_text())
    assert made[0] == made[1]
    assert (sent.jobs, len(sent.calls)) == (2, 2)


def test_the_control_has_the_published_settings(monkeypatch):
    made = []

    class Spy(short_runs.SelfTuning):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(short_runs, "METHODS", {"stn": Spy})
    for published in (False, True):
        about = {"task": "low-guess", "method": "stn", "seed": 0, "cycles": 1, "as_published": published}
        short_runs.one_run(about)
    ours, theirs = made
    assert [(m.clip, m.antithetic, m.hyper_optimizer.param_groups[0]["betas"][1]) for m in made] == [
        (1.0, True, 0.9),
        (None, False, 0.999),
    ]
    assert theirs.model.linear_1.weight_gate.std().item() == pytest.approx(0.01, rel=0.2)
    assert ours.model.linear_1.weight_gate.max() == 1


def test_counts_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        short_runs.main(["--cycles", "0"])
    assert "--cycles" in capsys.readouterr().err
