"""ptb: the STN paper's LSTM on Penn Treebank, with its seven tuned hyperparameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stn_fast.recipes import _texts
from stn_fast.training.config import Config

if TYPE_CHECKING:
    from stn_fast.training.task import Task


def config() -> Config:
    """Two layers of 650 units. 929,589 words in 40 streams of 70 are 331 steps, the published warm-up: one epoch."""
    return _texts.published("ptb")


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are damaged, or missing and not to be had.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    from stn_fast.data import ptb

    return _texts.build_task(config, ptb.load)
