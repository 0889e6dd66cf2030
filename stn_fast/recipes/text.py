"""text: a text of your own, in the files train.txt, valid.txt and test.txt of the data root."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stn_fast.recipes import _texts, ptb_small
from stn_fast.training.config import Config

if TYPE_CHECKING:
    from stn_fast.data.text import Corpus
    from stn_fast.training.task import Task

FILES = ("train.txt", "valid.txt", "test.txt")


def config() -> Config:
    """The network and the settings of ``ptb-small``, on all of the training text."""
    return replace(ptb_small.config(), recipe="text", train_fraction=1.0)


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: a file is missing, empty or not UTF-8, or has a word that there is no number for.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    return _texts.build_task(config, load)


def load(root: str | None = None, *, min_count: int = 1, train_fraction: float = 1.0) -> Corpus:
    """The corpus in ``root``; see `stn_fast.data.text.load`."""
    from stn_fast.data import text
    from stn_fast.data.download import data_root
    from stn_fast.errors import UserError
    from stn_fast.files import is_file

    paths = [data_root(root) / name for name in FILES]
    for path in paths:
        if not is_file(path):
            raise UserError(
                f"there is no file {path}: the recipe text wants {', '.join(FILES)} in --data-root or STN_FAST_DATA"
            )
    return text.load(*paths, min_count=min_count, train_fraction=train_fraction)
