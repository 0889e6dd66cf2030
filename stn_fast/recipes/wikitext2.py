"""wikitext2: the network and the settings of ``ptb`` on WikiText-2, twice its words and three times its vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stn_fast.recipes import _texts
from stn_fast.training.config import Config

if TYPE_CHECKING:
    from stn_fast.training.task import Task


def config() -> Config:
    """As ``ptb``; an epoch, and so the warm-up, has 745 steps."""
    return _texts.published("wikitext2")


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are not the published ones, or missing and not to be had.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    from stn_fast.data import wikitext2

    return _texts.build_task(config, wikitext2.load)
