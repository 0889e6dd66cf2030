"""The command that compares hypergradients with what training at other values arrives at."""

import copy
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_turn import InTurn
from random_response import respond

from benchmarks import hypergradient
from stn_fast.comparison import processes
from stn_fast.comparison.guesses import guessed
from stn_fast.comparison.runs import digest
from stn_fast.data import digits
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.recipes import recipe
from stn_fast.training.batches import Batches
from stn_fast.training.layering import resolve
from stn_fast.training.parameters import is_response
from stn_fast.training.run import run
from stn_fast.training.task import outputs

NAMES = ["input_dropout", "input_noise"]
OTHERS = [name for name in recipe("digits").config().hyperparameters if name not in NAMES]
QUICK = ["digits", "--guess", ".3", "--epochs", "5", "--at", ".7", "--horizons", "3", "rest"]
QUICK += ["--batches", "3", "--fit", "2"]
QUICK += [part for name in OTHERS for part in ("--set", f"hyperparameters.{name}.enabled=false")]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_kept_rows_of_older_versions_stay_those_of_their_settings():
    """So settings that come later must not change the digest at their defaults."""
    row = rows_of(Path(hypergradient.__file__).parent / "results" / "hypergradient-ptb-small.jsonl")[0]
    config = resolve(recipe(row["recipe"]).config(), pairs=[f"method.name={row['method']}", *row["set"]])
    assert digest(replace(guessed(config, row["guess"]), seed=row["seed"])) == row["settings"]
    later = replace(config, schedule=replace(config.schedule, accumulation=2))
    assert digest(later) != digest(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a finished command, with its rows, picture and output."""
    folder = tmp_path_factory.mktemp("made")
    with redirect_stdout(io.StringIO()) as said:
        assert hypergradient.main([*QUICK, "--out", str(folder / "rows"), "--figure", str(folder / "picture.png")]) == 0
    (folder / "said").write_text(said.getvalue())
    return folder


def test_it_writes_a_row_for_each_hyperparameter_a_table_and_a_picture(made, monkeypatch):
    rows = rows_of(made / "rows")
    assert [row["hyperparameter"] for row in rows] == NAMES
    assert all(list(row["differences"]) == ["0", "3", "rest"] for row in rows)
    assert (made / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in (made / "said").read_text() for name in NAMES)
    monkeypatch.setattr(hypergradient, "examine", lambda unit: pytest.fail("a row in the file was made again"))
    assert hypergradient.main([*QUICK, "--out", str(made / "rows")]) == 0


def test_rows_that_are_sent_to_processes_are_those_made_here(made, tmp_path, monkeypatch):
    sent = InTurn()
    monkeypatch.setattr(processes, "Processes", sent)
    assert hypergradient.main([*QUICK, "--jobs", "2", "--out", str(tmp_path / "rows")]) == 0
    assert rows_of(tmp_path / "rows") == rows_of(made / "rows")
    assert sent.jobs == 2
    assert len(sent.calls) >= 2


def test_the_rest_of_a_run_is_its_training_steps_that_are_left(made):
    epochs, per_pass = 5, 9
    warmup = 3 * per_pass
    for row in rows_of(made / "rows"):
        trained = warmup + round((row["step"] - warmup) * 2 / 3)
        assert row["rest"] == pytest.approx(epochs * per_pass - trained, abs=1)


@pytest.fixture(scope="module", params=["stn", "delta-stn"])
def at_a_state(request, tmp_path_factory):
    """A trainer and a method with a response, in the state of a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    defaults = recipe("digits").config()
    schedule, method = replace(defaults.schedule, epochs=2), replace(defaults.method, name=request.param)
    config = replace(defaults, run_dir=str(folder / "run"), schedule=schedule, method=method)
    (state,) = hypergradient.states(config, hypergradient.steps_at(config, [0.5]), folder / "kept").values()
    return hypergradient.trainer_at(config, state)


def test_the_difference_without_training_is_the_slope_of_the_loss_through_the_response(at_a_state):
    trainer, method, back = at_a_state
    back()
    respond(method.model)
    with torch.no_grad():
        for name, parameter in method.model.named_parameters():
            if "gate" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    data, center = trainer.task.data.valid, None if method.center is None else method.center.clone()
    at = method.location.detach().clone().requires_grad_()
    hyper = method.space.at(at, batch_size=data.examples, center=center)
    method.model.eval()
    loss = torch.nn.functional.cross_entropy(outputs(method.model, hyper, data.inputs), data.targets)
    (slopes,) = torch.autograd.grad(loss, at)
    found = [hypergradient.through_the_response(trainer, method, name, 0.05) for name in method.space.names]
    assert (torch.tensor(found) - slopes).norm() < 0.1 * slopes.norm()


def test_training_goes_on_with_other_regularisation_from_the_same_weights_and_state(at_a_state):
    trainer, method, back = at_a_state
    back()
    respond(method.model)
    saved = copy.deepcopy(trainer.state_dict())

    def here():
        back()
        trainer.load_state_dict(copy.deepcopy(saved))

    def along(shift, draw=0):
        return hypergradient.along(trainer, method, here, "input_dropout", shift, [0, 2, 5], draw)

    before = trainer.evaluate(trainer.task.data.valid)["loss"]
    high, low = along(1.0), along(-1.0)
    assert high[0] == pytest.approx(before, rel=1e-5), "the weights moved before any training"
    assert low[0] == pytest.approx(before, rel=1e-5)
    assert high[5] != low[5]
    assert high == along(1.0)
    assert high[5] != along(1.0, draw=1)[5], "a draw changes nothing"


def test_fitting_the_response_leaves_the_weights_as_they_are(at_a_state):
    trainer, method, back = at_a_state
    back()
    before = {name: parameter.clone() for name, parameter in method.model.named_parameters()}
    hypergradient.fit_response(trainer, method, 3)
    changed = {name for name, parameter in method.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(is_response(name) for name in changed)
    assert all(parameter.requires_grad for parameter in method.model.parameters())


def test_the_center_of_an_integer_can_be_shifted_too():
    integer = Hyperparameter("length", init=2.5, low=0.0, high=14.0, integer=True)
    space = HyperparameterSpace([integer, Hyperparameter("rate", init=0.3, low=0.0, high=0.9)])
    moved = hypergradient.shifted(space, "length", 0.5)
    before, after = space.initial_state()[0], moved.initial_state()[0]
    assert (after - before).tolist() == pytest.approx([0.5, 0.0], abs=1e-5)


def test_hypergradients_are_those_that_a_validation_step_uses(at_a_state):
    trainer, method, back = at_a_state
    back()
    respond(method.model)
    batch, step = trainer.valid_batches[0], trainer.step
    weights = [parameter.clone() for parameter in method.model.parameters()]
    loss, gradients = method.hypergradients(batch, step)
    before = method.location.detach().clone()
    assert method.valid_step(batch, step).item() == loss.item()
    for tensor, gradient in zip(method.tuned, gradients, strict=True):
        assert torch.equal(tensor.grad, gradient)
    assert not torch.equal(method.location.detach(), before)
    assert all(torch.equal(*pair) for pair in zip(weights, method.model.parameters(), strict=True))


def test_states_are_taken_at_shares_of_the_steps_that_a_whole_run_has(tmp_path):
    defaults = recipe("digits").config()
    config = replace(defaults, schedule=replace(defaults.schedule, epochs=4), run_dir=str(tmp_path / "run"))
    result = run(config, recipe("digits").build)
    assert hypergradient.steps_at(config, [1.0]) == [result["steps"]]
    batches = Batches(digits.load().train, config.schedule.batch_size, seed=0, stream=0)
    assert hypergradient.training_steps(config, batches) == result["steps"] - result["valid_steps"]


def test_a_run_that_ends_early_is_an_error_that_names_the_key(tmp_path, capsys):
    early = ["--set", "schedule.patience=1", "--set", "optimizer.learning_rate=3.0", "--set", "optimizer.clip=null"]
    with pytest.raises(SystemExit):
        hypergradient.main(["digits", "--epochs", "30", "--at", "1", "--horizons", "2", *early])
    assert "schedule.patience ended the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--horizons", "0"],
        ["--horizons", "soon"],
        ["--at", "1.5"],
        ["--batches", "1"],
        ["--draws", "0"],
        ["--width", "-1"],
    ],
)
def test_wrong_flags_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        hypergradient.main(["digits", *wrong])
    said = capsys.readouterr().err
    assert wrong[0] in said
    assert wrong[1] in said


def test_the_picture_has_a_line_for_each_state_and_the_table_leaves_out_what_was_not_measured():
    row = {
        "step": 5,
        "hyperparameter": "a",
        "value": 0.1,
        "scale": 0.5,
        "gradient": 1.0,
        "standard_error": 0.1,
        "fitted": 0.7,
    }
    row |= {"signal_to_noise": 2.0, "differences": {"0": [1.0], "10": [-2.0, -4.0]}, "rest": 30}
    later = {**row, "step": 9, "differences": {"0": [2.0], "rest": [4.0]}}
    said = hypergradient.table([row, later])
    assert "K = 10: the gradient has the sign of the difference in 0 of 1; " in said
    assert "the rest of the run: the gradient has the sign of the difference in 1 of 1; " in said
    assert "-3 ± 1" in said
    assert "nan" not in said
