"""Short self-tuned runs of digits, and trainers in the state of their checkpoints whose response is not near 0."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_response import respond

from stn_fast.exploration.restoring import restored
from stn_fast.recipes import digits
from stn_fast.training.layering import resolve
from stn_fast.training.run import run

QUICK = ("schedule.epochs=2", "method.warmup_epochs=1")


def no_warning(text):
    raise AssertionError(text)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """digits_run("key=value", ...): (directory, configuration) of a run of two epochs, made once for each setting."""
    made = {}

    def digits_run(*pairs):
        if pairs not in made:
            directory = tmp_path_factory.mktemp("explored") / "run"
            config = resolve(digits.config(), None, [*QUICK, *pairs])
            run(replace(config, run_dir=str(directory)), digits.build)
            made[pairs] = directory, replace(config, run_dir=str(directory))
        return made[pairs]

    return digits_run


@pytest.fixture
def restore(digits_run):
    """restore("key=value", ...): a trainer in the last state of such a run."""

    def restore(*pairs, best=False):
        directory, config = digits_run(*pairs)
        return restored(Path(directory), config, digits.build, no_warning, best=best)

    return restore


@pytest.fixture
def responding(restore):
    """The same, with a response that changes the loss and gates that differ between hyperparameters."""

    def responding(*pairs):
        trainer = restore(*pairs)
        torch.manual_seed(0)
        respond(trainer.method.model)
        with torch.no_grad():
            for name, parameter in trainer.method.model.named_parameters():
                if "gate" in name:
                    parameter.normal_(std=0.3)
        return trainer

    return responding
