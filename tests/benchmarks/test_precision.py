"""What a recipe's precision on CUDA rests on: the rule, the command, and that recipes follow the recorded runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import precision
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.spaces import build_space

RECORDED = json.loads((Path(precision.__file__).parent / "results" / "precision.json").read_text())


def test_recipes_take_bf16_on_cuda_where_recorded_runs_hold_their_quality_and_nowhere_else():
    def recipes_in(taken, device):
        found = {name: replace(recipe(name).config(), device=device).resolved.precision for name in RECIPES}
        assert set(found.values()) <= {"fp32", "bf16"}
        return {name for name in RECIPES if found[name] == taken}

    assert recipes_in("bf16", "cuda") == {name for name, runs in RECORDED.items() if precision.holds(runs)}
    assert recipes_in("fp32", "cpu") == set(RECIPES)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_differ_in_precision_only(name):
    config, seeds = recipe(name).config(), {}
    space = build_space(config)
    for run in RECORDED[name]:
        assert (run["recipe"], run["method"], run["diverged"]) == (name, "stn", None)
        assert run["epochs"] == config.schedule.epochs
        assert run["hyperparameters_start"] == pytest.approx(space.values(space.initial_state()[0]))
        seeds.setdefault(run["precision"], []).append(run["seed"])
    assert seeds["fp32"] == seeds["bf16"] == list(range(len(seeds["fp32"])))


@pytest.mark.parametrize(
    ("fp32", "bf16", "held"),
    [
        ([1.0, 2.0], [2.0, 3.0], True),  # worse by the range of fp32
        ([1.0, 2.0], [2.0, 3.1], False),
        ([1.0, 2.0], [0.5, 0.5], True),
        ([1.0], [0.5], False),  # one seed shows nothing
        ([1.0, 2.0], [0.5, None], False),
    ],
)
def test_bf16_holds_where_its_mean_is_worse_by_no_more_than_the_range_of_fp32(fp32, bf16, held):
    runs = [
        {"precision": name, "valid_loss": loss, "diverged": None}
        for name, losses in (("fp32", fp32), ("bf16", bf16))
        for loss in losses
    ]
    assert precision.holds(runs) == held


def test_it_makes_the_same_runs_in_both_precisions_and_prints_the_verdict(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert precision.main(["digits", "--seeds", "2", "--epochs", "4", "--json", str(file)]) == 0
    runs = json.loads(file.read_text())["digits"]
    assert [(run["seed"], run["precision"]) for run in runs] == [
        (0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"),
    ]  # fmt: skip
    assert len({run["valid_loss"] for run in runs}) == 4
    assert precision.verdict(runs) in capsys.readouterr().out


def test_wrong_arguments_are_refused(capsys):
    for arguments, says in ((["digits", "--jobs", "0"], "--jobs"), (["digit"], "invalid choice")):
        with pytest.raises(SystemExit) as stop:
            precision.main(arguments)
        assert stop.value.code == 2
        assert says in capsys.readouterr().err
