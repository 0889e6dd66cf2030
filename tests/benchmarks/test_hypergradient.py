"""The command that compares hypergradients with what training at other values arrives at."""

import copy
import json

import pytest
import torch
from random_response import respond

from benchmarks import hypergradient
from stn_fast.recipes import recipe

QUICK = ["digits", "--guess", ".3", "--epochs", "6", "--at", ".5", "--horizons", "3", "rest", "--batches", "3"]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_writes_a_row_for_each_hyperparameter_a_table_and_a_picture(tmp_path, capsys):
    out, figure = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    assert hypergradient.main([*QUICK, "--out", str(out), "--figure", str(figure)]) == 0
    rows, names = rows_of(out), list(recipe("digits").config().hyperparameters)
    assert [row["hyperparameter"] for row in rows] == names
    assert all(list(row["differences"]) == ["0", "3", "rest"] for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    before = out.read_text()
    assert hypergradient.main([*QUICK, "--out", str(out)]) == 0
    assert out.read_text() == before, "rows in the file were made again"


def test_rows_in_processes_of_their_own_are_those_made_in_turn(tmp_path):
    made = []
    for jobs in ("1", "2"):
        out = tmp_path / f"{jobs}.jsonl"
        assert hypergradient.main([*QUICK, "--jobs", jobs, "--out", str(out)]) == 0
        made.append(rows_of(out))
    assert made[0] == made[1]


@pytest.fixture(scope="module")
def at_a_state(tmp_path_factory):
    """A trainer and a method with a response, in the state of a checkpoint."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("runs")
    defaults = recipe("digits").config()
    schedule = replace(defaults.schedule, epochs=2)
    config = replace(defaults, run_dir=str(folder / "run"), schedule=schedule, hyperparameters=defaults.hyperparameters)
    (state,) = hypergradient.states(config, [0.5], folder / "kept")
    trainer, method, back = hypergradient.trainer_at(config, state)
    return trainer, method, back


def test_the_difference_without_training_is_the_slope_of_the_loss_through_the_response(at_a_state):
    trainer, method, back = at_a_state
    back()
    respond(method.model)
    saved = copy.deepcopy(trainer.state_dict())
    location, width = method.location.detach().clone(), 0.1
    for column in (0, 3):
        losses = {}
        for sign in (1, -1):
            there = location.clone()
            there[column] += sign * width
            moved = hypergradient.along(trainer, method, lambda: trainer.load_state_dict(saved), there, [0], 0)
            losses[sign] = moved[0]
        data = trainer.task.data.valid
        at = method.location.detach().copy_(location).clone().requires_grad_()
        hyper = method.space.at(at, batch_size=data.examples)
        method.model.eval()
        loss = torch.nn.functional.cross_entropy(method.model(data.inputs, hyper), data.targets)
        (slope,) = torch.autograd.grad(loss, at)
        assert (losses[1] - losses[-1]) / (2 * width) == pytest.approx(slope[column].item(), rel=2e-2)


def test_training_goes_on_at_the_given_location_from_the_same_state(at_a_state):
    trainer, method, back = at_a_state
    back()
    there = method.location.detach() + 1.0
    first = hypergradient.along(trainer, method, back, there, [0, 2, 5], 0)
    assert first == hypergradient.along(trainer, method, back, there, [0, 2, 5], 0)
    assert first[5] != hypergradient.along(trainer, method, back, there - 2, [0, 2, 5], 0)[5]
    assert first[5] != hypergradient.along(trainer, method, back, there, [0, 2, 5], 1)[5], "a draw changes nothing"
    assert torch.equal(method.location.detach(), there)


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
    from dataclasses import replace

    from stn_fast.training.run import run

    defaults = recipe("digits").config()
    config = replace(defaults, schedule=replace(defaults.schedule, epochs=4), run_dir=str(tmp_path / "run"))
    assert hypergradient.steps_of(config) == run(config, recipe("digits").build)["steps"]


@pytest.mark.parametrize("wrong", [["--horizons", "0"], ["--horizons", "soon"], ["--at", "1.5"], ["--batches", "1"]])
def test_wrong_flags_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        hypergradient.main(["digits", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_the_picture_has_a_line_for_each_state_and_the_table_leaves_out_what_was_not_measured():
    row = {"step": 5, "hyperparameter": "a", "value": 0.1, "scale": 0.5, "gradient": 1.0, "standard_error": 0.1}
    row |= {"signal_to_noise": 2.0, "differences": {"0": [1.0], "10": [-2.0, -4.0]}, "rest": 30}
    later = {**row, "step": 9, "differences": {"0": [2.0], "rest": [4.0]}}
    said = hypergradient.table([row, later])
    assert "K = 10: the gradient has the sign of the difference in 0 of 1" in said
    assert "the rest of the run: the gradient has the sign of the difference in 1 of 1" in said
    assert "-3" in said
    assert "nan" not in said
