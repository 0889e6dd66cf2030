"""Self-tuning of linear regressions whose best responses, and so whose best hyperparameters, have a closed form."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_fast as stn
from stn_fast.training.methods import SelfTuning

EXAMPLES, INPUTS, VALID = 60, 20, 3000
GRID = {"weight_decay": np.geomspace(1e-5, 30, 1000), "dropout": np.linspace(1e-4, 0.949, 1000)}


class Regression:
    """y = x·(sparse weights) + noise, and the exact solution at each value of a regulariser."""

    def __init__(self, outputs, seed):
        rng = np.random.default_rng(seed)
        weights = rng.normal(size=(INPUTS, outputs)) * (rng.random((INPUTS, outputs)) < 0.5)
        sizes = np.exp(0.4 * rng.normal(size=INPUTS))
        self.x, self.valid_x = (rng.normal(size=(rows, INPUTS)) * sizes for rows in (EXAMPLES, VALID))
        self.y, self.valid_y = (x @ weights + 2.5 * rng.normal(size=(len(x), outputs)) for x in (self.x, self.valid_x))
        self.outputs = outputs

    def loss(self, kind, value):
        """The validation loss of the minimum of the training loss, mean square + ½·decay·‖W‖² or with dropout."""
        square = self.x.T @ self.x
        extra = {
            "weight_decay": EXAMPLES * self.outputs * value / 2 * np.eye(INPUTS),
            "dropout": value / (1 - value) * np.diag(np.diag(square)),
        }[kind]
        return np.mean((self.valid_x @ np.linalg.solve(square + extra, self.x.T @ self.y) - self.valid_y) ** 2)

    def left(self, kind, guess, value):
        """What is left of the way from the guess to the optimum, in validation loss."""
        best = min(self.loss(kind, one) for one in GRID[kind])
        return (self.loss(kind, value) - best) / (self.loss(kind, guess) - best)


class Network(nn.Module):
    def __init__(self, outputs, kind):
        super().__init__()
        self.layer = stn.HyperLinear(INPUTS, outputs, bias=False, num_hyperparameters=1)
        self.dropout = stn.PerExampleDropout("dropout", stream=1) if kind == "dropout" else None

    def forward(self, x, hyper):
        return self.layer(x if self.dropout is None else self.dropout(x, hyper), hyper)


def square_loss(model, batch, hyper):
    return F.mse_loss(model(batch.inputs, hyper), batch.targets)


def decayed_square_loss(model, batch, hyper):
    return square_loss(model, batch, hyper) + model.layer.weight_decay_penalty(hyper, hyper["weight_decay"])


def tuned(problem, kind, guess, cycles=900, **options):
    torch.manual_seed(0)
    high = 0.95 if kind == "dropout" else None
    space = stn.HyperparameterSpace([stn.Hyperparameter(kind, low=0.0, high=high, init=guess, scale=0.3)])
    method = SelfTuning(
        Network(problem.outputs, kind),
        space,
        decayed_square_loss if kind == "weight_decay" else square_loss,
        square_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01 * problem.outputs, momentum=0.9),
        hyper_optimizer=partial(torch.optim.Adam, lr=1e-2),
        tune_scales=False,
        **options,
    )
    x, y, valid_x, valid_y = (
        torch.from_numpy(a).float() for a in (problem.x, problem.y, problem.valid_x, problem.valid_y)
    )
    copies = 4 if kind == "dropout" else 1  # of the training set in a batch, each with masks of its own
    x, y = x.repeat(copies, 1), y.repeat(copies, 1)
    step, ends = 0, []
    for cycle in range(cycles):
        for _ in range(2):
            method.train_step((x, y), step)
            step += 1
        if cycle >= 100:
            rows = torch.randint(VALID, (500,))
            method.valid_step((valid_x[rows], valid_y[rows]), step)
            step += 1
            if cycle >= cycles - 100:
                ends.append(method.location.item())
    return space.values(torch.tensor([np.mean(ends)], dtype=torch.float32))[kind]


@pytest.mark.parametrize(("outputs", "kind", "guess"), [(1, "weight_decay", 1e-3), (50, "dropout", 0.7)])
def test_tuning_arrives_where_the_optimum_is_known(outputs, kind, guess):
    problem = Regression(outputs, seed=0)
    assert problem.left(kind, guess, tuned(problem, kind, guess)) < 0.1


def test_one_output_needs_antithetic_steps():
    """With one pass for each step, the noise of the response's gradient decides where the hyperparameter goes."""
    problem = Regression(1, seed=0)
    value = tuned(problem, "weight_decay", 1e-3, antithetic=False)
    assert problem.left("weight_decay", 1e-3, value) > 0.9
