"""Recipes on scikit-learn's digits: an MLP 64-256-256-10, from a deliberately bad first guess.

digits        900 training images, on which little regularisation is best
digits_small  90 training images, on which the best values are inside of their ranges; 400 validation images
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stn_fast.recipes import Recipe
from stn_fast.training.config import (
    Config,
    HyperparameterConfig,
    MethodConfig,
    ScheduleConfig,
    as_published,
)

if TYPE_CHECKING:
    from stn_fast.training.task import Task

SIZES = (64, 256, 256, 10)


def config() -> Config:
    """Five tuned hyperparameters. Dropout and noise start far too high for such a small data set.

    On CUDA it uses bf16, with which its losses are as good as with fp32 (benchmarks/results/precision.json).

    It uses one thread: a second one saves a tenth of the time on an idle machine, but costs several times as much on a
    busy one.
    """
    dropout = HyperparameterConfig(init=0.3, low=0.0, high=0.9)
    defaults = Config(
        recipe="digits",
        hyperparameters={
            "input_dropout": dropout,
            "hidden_dropout_1": dropout,
            "hidden_dropout_2": dropout,
            "input_noise": HyperparameterConfig(init=0.3, low=0.0),
            "weight_decay": HyperparameterConfig(init=1e-3, low=0.0),
        },
        method=MethodConfig(warmup_epochs=3),
        schedule=ScheduleConfig(epochs=120),
        threads=1,
        precision="auto",
    )
    return as_published(defaults)


def _small() -> Config:
    """A tenth of the training images, in two batches, and the package's own steps and start of the response.

    Scales shrink from 2 to 0.5 over the run. With narrow ones, noise that starts far too small has no effect from which
    the response could learn.
    """
    wide = {name: replace(one, scale=2.0) for name, one in config().hyperparameters.items()}
    return Config(
        recipe="digits-small",
        hyperparameters={**wide, "input_noise": replace(wide["input_noise"], init=0.1)},
        method=MethodConfig(warmup_epochs=30, tune_scales=False, scale_decay=0.25),
        schedule=ScheduleConfig(epochs=750, batch_size=45),
        threads=1,
        train_fraction=0.1,
    )


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are not finite.
        ValueError: the space or the layers refuse a hyperparameter's range or scale.
    """
    import torch

    from stn_fast.data import digits, fraction, placed
    from stn_fast.models import plain_mlp, tuned
    from stn_fast.training import task
    from stn_fast.training.spaces import build_space

    space, data = build_space(config), digits.load()
    data = data._replace(train=fraction(data.train, config.train_fraction, seed=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = tuned(plain_mlp(SIZES), space, config.method.response_rank).to(config.device)
    return task.Task(
        space=space,
        model=model,
        data=placed(data, config.device),
        training_objective=task.decayed_classification_loss,
        validation_objective=task.classification_loss,
        scores=task.classification_scores,
        loss_unit="nats",
    )


digits_small = Recipe(_small, build)
