"""The learning rate tuned beside regularisation: its hypergradient, its command, and what the recorded runs show."""

import json
from functools import partial
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import nn

from benchmarks import learning_rate
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.training.batches import as_batch

RECORDED = Path(learning_rate.__file__).parent / "results" / "learning-rate.jsonl"


class Net(nn.Module):
    """Twice differentiable, and responds to one hyperparameter."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, inputs, hyper):
        return self.last(self.first(inputs).tanh() * (1 + hyper.response))


def objective(model, batch, hyper):
    return (model(batch.inputs, hyper) - batch.targets).square().mean() + 0 * hyper["one"].sum()


def test_it_is_the_neumann_series_with_the_exact_hessian():
    torch.manual_seed(0)
    train, valid = ([torch.randn(30, 5).double(), torch.randn(30, 2).double()] for _ in range(2))
    space = HyperparameterSpace([Hyperparameter("one", init=0.0)])
    method = learning_rate.TunedRate(
        Net().double(), space, objective, objective,
        optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.8), clip=0.1, antithetic=False,
    )  # fmt: skip
    method.follow(0.1)
    method.every, method.terms = 1, 3
    for step in range(3):
        method.train_step(train, step)
    method.valid_step(valid, 3)
    weights, towards, rate = method.weights, method.towards, method.learning_rate
    batch = as_batch(train, torch.device("cpu"))
    hyper = method._training_hypers(method._draw(batch, 4, 0))[0]
    gradients = torch.autograd.grad(objective(method.model, batch, hyper), weights, create_graph=True)
    norm = torch.cat([part.flatten() for part in gradients]).norm().detach()
    kept = 0.1 / (norm + 1e-6)
    assert kept < 1
    updates = [
        rate * (0.8 * method.optimizer.state[weight]["momentum_buffer"] + kept * gradient)
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    term, series = towards, towards
    for _ in range(2):
        moved = torch.autograd.grad(updates, weights, term, retain_graph=True)
        term = [one - by for one, by in zip(term, moved, strict=True)]
        series = [one + new for one, new in zip(series, term, strict=True)]
    expected = -sum((one * update).sum() for one, update in zip(series, updates, strict=True))
    before = [weight.detach().clone() for weight in weights]
    method._move_rate(towards, batch, method._draw(batch, 4, 0))
    assert all(torch.equal(weight, was) for weight, was in zip(weights, before, strict=True))
    torch.testing.assert_close(method.log_rate.grad.double(), expected.detach(), rtol=1e-5, atol=0)
    assert method.learning_rate != rate


def test_the_command_keeps_its_runs(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    arguments = ["digits", "--epochs", "6", "--seeds", "1", "--factors", "1", "--out", str(file)]
    assert learning_rate.main(arguments) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["stn", "stn+lr"]
    assert rows[0]["rate"] == 0.05 != rows[1]["rate"]
    said = capsys.readouterr().out
    assert "stn+lr, rate x 1" in said
    assert learning_rate.main(arguments) == 0
    assert capsys.readouterr().out == said


def test_wrong_arguments_are_refused(capsys):
    for wrong in (["--seeds", "0"], ["--step", "-1"]):
        with pytest.raises(SystemExit):
            learning_rate.main(wrong)
        assert "--seeds must be at least 1 and --step above 0" in capsys.readouterr().err


def test_the_recorded_runs_are_what_is_said_of_them():
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]

    def at(column, factor, step):
        found = [row[column] for row in rows if (row["factor"], row["step"]) == (factor, step)]
        assert len(found) == 5
        return mean(found)

    for step in (0.05, 0.02):
        assert at("valid_loss", 0.1, step) < 0.4 * at("valid_loss", 0.1, None)
        assert at("valid_loss", 1.0, step) > 1.2 * at("valid_loss", 1.0, None)
        assert at("valid_loss", 4.0, step) > at("valid_loss", 4.0, None)
    seconds = [sum(row["wall_seconds"] for row in rows if row["step"] == step) for step in (0.05, None)]
    assert seconds[0] / seconds[1] == pytest.approx(1.6, abs=0.05)
