"""Rows of runs that nobody made."""

import pytest


def made_row(method, seed, valid, test, *, guess="low", trial=None, cpu=10.0, diverged=None, curve=None, **more):
    """A row as of runs.jsonl, with one evaluation at its end; ``curve`` is a list of (cpu, valid, test).

    Steps have half of the CPU time.
    """
    points = [(cpu, valid, test)] if curve is None else curve
    columns = list(zip(*points, strict=True)) or [(), (), ()]
    names = ("cpu_seconds", "valid_loss", "test_loss")
    row = {
        "recipe": "digits",
        "method": method,
        "guess": None if trial is not None else guess,
        "seed": seed,
        "trial": trial,
        "settings": "0",
        "cpu_seconds": cpu,
        "step_cpu_seconds": cpu / 2,
        "train_examples": 1000,
        "valid_examples": 100,
        "diverged": diverged,
        "loss_unit": "nats",
        "curve": {name: list(column) for name, column in zip(names, columns, strict=True)},
    }
    row["curve"]["step_cpu_seconds"] = [seconds / 2 for seconds in row["curve"]["cpu_seconds"]]
    scores = {"valid_loss": valid, "test_loss": test, "hyperparameters_end": {"dropout": valid}}
    return {**row, **({} if diverged else scores), **more}


@pytest.fixture
def make_row():
    return made_row
