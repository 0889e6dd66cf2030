"""ptb-small: minutes on a CPU. A twentieth of Penn Treebank to train on, all of its validation and test text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stn_fast.recipes import _texts
from stn_fast.training.config import Config, HyperOptimizerConfig, OptimizerConfig, ScheduleConfig, TextConfig

if TYPE_CHECKING:
    from stn_fast.training.task import Task

SHARE = 0.05  # the first 46,480 words; 3,141 distinct ones are there at least twice


def config() -> Config:
    """Two layers of 200 units and the hyperparameters of ``ptb``."""
    return replace(
        _texts.published("ptb-small"),
        optimizer=OptimizerConfig(name="adam", learning_rate=4e-3, momentum=0.9, clip=0.25),
        hyper_optimizer=HyperOptimizerConfig(learning_rate=3e-2),
        schedule=ScheduleConfig(epochs=25, batch_size=20, valid_batch_size=20, eval_batch_size=2000),
        text=TextConfig(window=35, valid_streams=20, test_streams=20, min_count=2, width=200, layers=2),
        train_fraction=SHARE,
    )


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are damaged, or missing and not to be had.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    from stn_fast.data import ptb

    return _texts.build_task(config, ptb.load)
