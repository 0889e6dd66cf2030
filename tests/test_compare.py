"""python -m stn_fast.compare: its files, what it makes again and what it keeps, and one-line errors."""

import json
import sys
from dataclasses import replace

import pytest
from in_turn import InTurn, StoppedInTurn

from stn_fast import compare
from stn_fast.comparison import plan
from stn_fast.comparison.runs import METHODS, configure, digest
from stn_fast.recipes import recipe
from stn_fast.training.config import HyperOptimizerConfig, MethodConfig
from stn_fast.training.trainer import Trainer

ALL = ["--methods", "stn,fixed,tpe", "--guesses", "low,.6", "--seeds", "1", "--budget", "2", "--epochs", "2"]


@pytest.fixture
def in_turn(monkeypatch):
    """Runs are made in this process."""
    made = InTurn()
    monkeypatch.setattr(plan, "Processes", made)
    return made


def rows(folder):
    """The rows of a comparison by what they are of, without times."""
    found = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    keys = ("settings", "sample", "valid_loss", "test_loss", "train_examples", "valid_examples", "hyperparameters_end")
    return {
        (row["method"], row["guess"], row["seed"], row["trial"]): {key: row.get(key) for key in keys} for row in found
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a comparison that nothing disturbed, to be read only."""
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "Processes", InTurn())
        assert compare.main(["digits", *ALL, "--out", str(folder)]) == 0
    return folder


def test_it_leaves_a_row_of_every_run_the_tables_and_the_figure(whole):
    assert {path.name for path in whole.iterdir()} - {".lock"} == {
        "runs.jsonl",
        "searches.journal",
        "compare.json",
        "compare.png",
    }
    runs = {(method, guess, 0, None) for method in ("stn", "fixed") for guess in ("low", "0.6")}
    assert set(rows(whole)) == runs | {("tpe", None, 0, 0), ("tpe", None, 0, 1)}
    written = json.loads((whole / "compare.json").read_text())
    assert written["settings"]["config"]["schedule"]["epochs"] == written["settings"]["budget"] == 2
    assert written["settings"]["config"]["threads"] == 1
    assert written["settings"]["versions"].keys() >= {"stn_fast", "torch", "backend"}
    fixed = rows(whole)["fixed", "0.6", 0, None]
    (score,) = [each for each in written["scores"] if (each["method"], each["guess"]) == ("fixed", "0.6")]
    assert score["test_loss"]["median"] == fixed["test_loss"]
    assert fixed["hyperparameters_end"]["input_dropout"] == pytest.approx(0.6)
    assert fixed["train_examples"] == 2 * 900
    trials = [rows(whole)["tpe", None, 0, trial] for trial in range(2)]
    for trial in trials:
        assert trial["hyperparameters_end"] == pytest.approx(trial["sample"])
    (score,) = [each for each in written["scores"] if (each["method"], each["part"]) == ("tpe", "all")]
    assert score["test_loss"]["median"] == min(trials, key=lambda trial: trial["valid_loss"])["test_loss"]
    assert (whole / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_curve_of_a_run_has_every_evaluation(whole):
    for line in (whole / "runs.jsonl").read_text().splitlines():
        row = json.loads(line)
        curve = row["curve"]
        assert [len(column) for column in curve.values()] == [3] * 6
        assert all(step <= whole for step, whole in zip(curve["step_cpu_seconds"], curve["cpu_seconds"], strict=True))
        assert 0 < curve["step_cpu_seconds"][-1] <= row["step_cpu_seconds"] < row["cpu_seconds"]
        assert min(curve["valid_loss"]) == pytest.approx(row["valid_loss"])
        assert curve["train_examples"][-1] == row["train_examples"]
        assert 0 < curve["cpu_seconds"][0] < curve["cpu_seconds"][-1] <= row["cpu_seconds"]


@pytest.mark.parametrize("first", [1, 3])
def test_a_command_that_is_stopped_continues_and_has_the_same_runs(in_turn, whole, tmp_path, first):
    command = ["digits", *ALL, "--out", str(tmp_path)]
    in_turn.stop_after = first
    with pytest.raises(StoppedInTurn):
        compare.main(command)
    in_turn.stop_after = None
    assert compare.main(command) == 0
    assert len(in_turn.calls) == 6
    assert rows(tmp_path) == rows(whole)


def test_a_run_that_is_stopped_continues_from_its_checkpoint(in_turn, whole, tmp_path, monkeypatch):
    command, advance, steps = ["digits", *ALL, "--out", str(tmp_path)], Trainer._advance, []

    def killed(trainer):
        steps.append(trainer.step)
        if len(steps) == 15:  # in the second epoch of the first trial
            raise StoppedInTurn
        advance(trainer)

    monkeypatch.setattr(Trainer, "_advance", killed)
    with pytest.raises(StoppedInTurn):
        compare.main(command)
    assert compare.main([*command[:1], "--methods", "tpe", *command[3:]]) == 0
    assert steps[14:16] == [14, 9]  # from the end of the first epoch
    expected = {key: row for key, row in rows(whole).items() if key[0] == "tpe"}
    assert rows(tmp_path) == expected
    assert not (tmp_path / "unfinished").exists()


def made_again(in_turn, whole, folder, *arguments):
    """The number of runs that a command makes where those of ``whole`` are kept."""
    for name in ("runs.jsonl", "searches.journal"):
        (folder / name).write_bytes((whole / name).read_bytes())
    in_turn.calls.clear()
    assert compare.main(["digits", *ALL, "--out", str(folder), *arguments]) == 0
    return len(in_turn.calls)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([], 0),
        (["--jobs", "2"], 0),
        (["--budget", "3"], 1),
        (["--methods", "frozen,tpe"], 2),
        (["--epochs", "1"], 6),
        (["--set", "hyper_optimizer.learning_rate=0.02"], 2),
        (["--set", "optimizer.learning_rate=0.02"], 6),
        (["--set", "hyperparameters.weight_decay.low=-0.001"], 6),
    ],
)
def test_runs_are_made_again_where_a_setting_differs_and_only_there(in_turn, whole, tmp_path, arguments, count):
    assert made_again(in_turn, whole, tmp_path, *arguments) == count


def test_rows_of_other_sources_are_kept_and_counted(in_turn, whole, tmp_path, monkeypatch, capsys):
    assert made_again(in_turn, whole, tmp_path) == 0
    assert "other sources" not in capsys.readouterr().out
    monkeypatch.setattr("stn_fast.comparison.command.sources_digest", lambda: "changed")
    assert made_again(in_turn, whole, tmp_path) == 0
    assert "6 of 6 rows were made by other sources of the package." in capsys.readouterr().out


def test_a_trial_is_made_again_if_its_row_is_of_another_draw(in_turn, whole, tmp_path):
    found = [json.loads(line) for line in (whole / "runs.jsonl").read_text().splitlines()]
    (trial,) = [row for row in found if row["trial"] == 1]
    trial["sample"]["input_dropout"] += 0.1
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert compare.main(["digits", *ALL, "--out", str(tmp_path)]) == 0
    assert len(in_turn.calls) == 1
    assert rows(tmp_path) == rows(whole)


def test_the_settings_of_a_row_depend_on_all_but_the_places_of_files(tmp_path):
    config = recipe("digits").config()
    asked = plan.Comparison("digits", config, ("stn",), ("low",), 1, 1, tmp_path, {"data": {"train": "sha256:0"}})
    assert asked.settings(replace(config, run_dir="elsewhere", data_root="elsewhere")) == asked.settings(config)
    others = [asked.settings(replace(config, threads=2)), asked.settings(config, space={})]
    others.append(replace(asked, circumstances={"data": {"train": "sha256:1"}}).settings(config))
    assert len({asked.settings(config), *others}) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_not_depend_on_that_of_the_recipe(tmp_path, method):
    config = recipe("digits").config()
    others = [MethodConfig(name="fixed"), MethodConfig(name="stn", freeze=True), MethodConfig(name="delta-stn")]
    found = {digest(configure(replace(config, method=m), method, 0, 1.0, tmp_path, None)) for m in others}
    assert len(found) == 1


def test_fixed_runs_do_not_depend_on_settings_of_tuning(tmp_path):
    config = recipe("digits").config()
    hyper, method = HyperOptimizerConfig(learning_rate=0.5), replace(config.method, train_steps=9, antithetic=True)
    wide = {name: replace(one, scale=2.0) for name, one in config.hyperparameters.items()}
    higher = {name: replace(one, init=0.4) for name, one in config.hyperparameters.items()}
    others = [
        replace(config, hyper_optimizer=hyper, method=method, hyperparameters=wide),
        replace(config, method=replace(config.method, response_rank=2)),
        replace(config, hyperparameters=higher),
    ]
    same, *different = [digest(configure(c, "fixed", 0, 1.0, tmp_path, None)) for c in others]
    assert digest(configure(config, "fixed", 0, 1.0, tmp_path, None)) == same not in different


def test_the_number_of_checkpoints_kept_is_no_setting_of_a_row(tmp_path):
    config = recipe("digits").config()
    more, rarer = (
        replace(config, schedule=replace(config.schedule, **{key: 5})) for key in ("checkpoints_kept", "epochs")
    )
    assert digest(more) == digest(config) != digest(rarer)


def test_a_row_has_the_settings_that_its_run_used(in_turn, tmp_path):
    given = ["--set", "hyper_optimizer.learning_rate=0.02", "--set", "method.train_steps=3"]
    methods = ["--methods", "stn,one-pass", "--guesses", "low"]
    assert compare.main(["digits", *ALL, *methods, *given, "--out", str(tmp_path)]) == 0
    found = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    used = {row["method"]: row["used"] for row in found}
    rates = {method: sections["hyper_optimizer"]["learning_rate"] for method, sections in used.items()}
    assert rates == {"stn": 0.02, "one-pass": 0.05}
    assert {method: sections["method"]["train_steps"] for method, sections in used.items()} == {
        "stn": 3,
        "one-pass": 10,
    }
    assert used["one-pass"]["optimizer"]["decay_factor"] == 1


def test_rows_are_in_the_order_of_methods_guesses_seeds_and_trials(tmp_path):
    asked = plan.Comparison("digits", recipe("digits").config(), ("tpe", "stn"), (0.6, "low"), 2, 2, tmp_path, {})
    keys = ("method", "guess", "seed", "trial")
    searches = [("tpe", None, seed, trial) for seed in range(2) for trial in range(2)]
    expected = searches + [("stn", guess, seed, None) for guess in ("0.6", "low") for seed in range(2)]
    found = [dict(zip(keys, each, strict=True)) for each in reversed(expected)]
    assert [tuple(row.values()) for row in sorted(found, key=asked.place_in_tables)] == expected


def test_runs_on_other_data_are_not_used(in_turn, whole, tmp_path, monkeypatch):
    found = plan.circumstances
    monkeypatch.setattr(
        "stn_fast.comparison.command.circumstances",
        lambda *given: {**found(*given), "data": {"train": "sha256:0"}},
    )
    assert made_again(in_turn, whole, tmp_path) == 6


def test_runs_in_processes_of_their_own_give_what_runs_in_turn_give(whole, tmp_path):
    arguments = [*ALL, "--methods", "fixed", "--guesses", "low", "--jobs", "2", "--out", str(tmp_path)]
    assert compare.main(["digits", *arguments]) == 0
    assert rows(tmp_path) == {key: row for key, row in rows(whole).items() if key[:2] == ("fixed", "low")}


def test_runs_that_become_non_finite_are_counted(in_turn, tmp_path, capsys):
    wild = ["--set", "optimizer.learning_rate=1e30", "--set", "optimizer.clip=null"]
    assert compare.main(["digits", *ALL, *wild, "--out", str(tmp_path)]) == 0
    methods = {each["method"]: each for each in json.loads((tmp_path / "compare.json").read_text())["methods"]}
    assert [(methods[name]["not_finite"], methods[name]["runs"]) for name in ("stn", "fixed", "tpe")] == [(2, 2)] * 3
    row = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])
    assert row["cpu_seconds"] > 0
    assert "became non-finite" in capsys.readouterr().err


def test_without_optuna_there_are_no_searches_and_everything_else(in_turn, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert compare.main(["digits", *ALL, "--methods", "fixed", "--out", str(tmp_path)]) == 0
    assert compare.main(["digits", *ALL, "--out", str(tmp_path / "other")]) == 2
    assert "optuna is missing: pip install 'stn-fast[compare]'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["digit"], "unknown recipe 'digit': did you mean 'digits'?"),
        (["digits", "--methods", "stn,tpee"], "--methods 'tpee': did you mean 'tpe'?"),
        (["digits", "--guesses", "lows"], "--guesses 'lows': must be a rate, or a name: did you mean 'low'?"),
        (["digits", "--guesses", "low,.95"], "init = 0.95"),
        (["digits", "--budget", "0"], "--budget must be at least 1, got 0"),
        (["digits", "--seeds", "0"], "--seeds must be at least 1"),
        (["digits", "--jobs", "-1"], "--jobs must be at least 1"),
        (["digits", "--set", "device=cuda"], "device = cuda: must be cpu"),
        (["digits", "--set", "seed=3"], "seed is set by --seeds"),
        (["digits", "--set", "method.name=fixed"], "method.name is set by --methods"),
        (["digits", "--set", "method={name: delta-stn}"], "method.name is set by --methods"),
        (["digits", "--set", "method={train_steps: 3, freeze: true}"], "method.freeze is set by --methods"),
        (["digits", "--set", "hyperparameters.input_noise.low=null"], "a bound of input_noise"),
        (["digits", "--set", "schedule.epoch=3"], "did you mean 'epochs'"),
        (["digits", "--sed", "3"], "did you mean '--seeds'"),
        ([], "recipe"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["runs.jsonl", "searches.journal"])
def test_a_damaged_file_is_named_and_left_as_it_is(in_turn, whole, tmp_path, capsys, name):
    for file in ("runs.jsonl", "searches.journal"):
        (tmp_path / file).write_bytes((whole / file).read_bytes())
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], "damaged\n", *lines[1:]])
    (tmp_path / name).write_text(damaged)
    assert compare.main(["digits", *ALL, "--out", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / name).read_text() == damaged
    assert not in_turn.calls


def test_two_comparisons_cannot_share_a_folder_at_the_same_time(in_turn, tmp_path, capsys):
    from stn_fast.comparison.command import folder

    with folder(tmp_path):
        assert compare.main(["digits", *ALL, "--out", str(tmp_path)]) == 2
    assert "another comparison is using" in capsys.readouterr().err
