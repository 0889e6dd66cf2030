"""Recipes on texts: the STN paper's LSTM language model and its seven tuned hyperparameters.

ptb         on Penn Treebank, as published
ptb_small   minutes on a CPU: two layers of 200 units on a twentieth of the text
wikitext2   the network and settings of ptb on twice as many words and a vocabulary three times as large
text        the network and settings of ptb_small on your own three text files

On CUDA, all but ptb_small use fp32 until their results with bf16 have been measured; ptb_small uses bf16, with which
its losses are as good (benchmarks/results/precision.json).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stn_fast.recipes import Recipe
from stn_fast.training.config import (
    Config,
    HyperOptimizerConfig,
    HyperparameterConfig,
    MethodConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    as_published,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stn_fast.data.text import Corpus
    from stn_fast.training.task import Task

SMALL_SHARE = 0.05  # the first 46,480 words, with 3,141 distinct words that occur at least twice
FILES = ("train.txt", "valid.txt", "test.txt")


def hyperparameters() -> dict[str, HyperparameterConfig]:
    """The seven hyperparameters of the paper's table, in its order; σ is 1 and not tuned.

    The dropout rates of words and weights, which all examples share, and the weights α and β of the penalties on
    activations are drawn once per batch.
    """
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.95, scale=1.0)
    dropout_of_batch = HyperparameterConfig(init=0.05, low=0.0, high=0.95, scale=1.0, per_example=False)
    penalty = HyperparameterConfig(init=0.05, low=0.0, scale=1.0, per_example=False)
    return {
        "output_dropout": dropout,
        "input_dropout": dropout,
        "hidden_dropout": dropout,
        "embedding_dropout": dropout_of_batch,
        "recurrent_dropout": dropout_of_batch,
        "activation_regularization": penalty,
        "temporal_activation_regularization": penalty,
    }


def _settings(recipe: str) -> Config:
    """The paper's settings for Penn Treebank, for ``recipe``; `as_published` adds its steps and start."""
    return Config(
        recipe=recipe,
        hyperparameters=hyperparameters(),
        method=MethodConfig(train_steps=2, valid_steps=1, warmup_epochs=1, tune_scales=False),
        optimizer=OptimizerConfig(
            learning_rate=30.0,
            momentum=0.0,
            clip=0.25,
            decay_factor=0.25,
            decay_patience=5,
            min_learning_rate=3e-4,
        ),
        hyper_optimizer=HyperOptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(epochs=200, patience=20, batch_size=40, valid_batch_size=10),
        text=TextConfig(window=70, valid_streams=10, test_streams=1, width=650, layers=2),
    )


def _ptb() -> Config:
    """Two layers of 650 units. 929,589 words in 40 columns, 70 at a time, are 331 steps: the published warm-up."""
    return as_published(_settings("ptb"))


def _ptb_small() -> Config:
    """Two layers of 200 units and the hyperparameters of ``ptb``, whose scales shrink from 2 to 1 over the run."""
    settings = _settings("ptb-small")
    return replace(
        settings,
        hyperparameters={name: replace(one, scale=2.0) for name, one in settings.hyperparameters.items()},
        method=replace(settings.method, scale_decay=0.5),
        optimizer=OptimizerConfig(name="adam", learning_rate=4e-3, momentum=0.9, clip=0.25),
        hyper_optimizer=HyperOptimizerConfig(learning_rate=3e-2),
        schedule=ScheduleConfig(epochs=25, batch_size=20, valid_batch_size=20, eval_batch_size=2000),
        text=TextConfig(window=35, valid_streams=20, test_streams=20, min_count=2, width=200, layers=2),
        train_fraction=SMALL_SHARE,
        precision="auto",
    )


def _wikitext2() -> Config:
    """As ``ptb``; an epoch, and so the warm-up, is 745 steps."""
    return as_published(_settings("wikitext2"))


def _text() -> Config:
    """The network and the settings of ``ptb-small``, on all of the training text."""
    return replace(_ptb_small(), recipe="text", train_fraction=1.0, precision="fp32")


def build_task(config: Config, load: Callable[..., Corpus]) -> Task:
    """The task of predicting the next word; weights are drawn from ``config.seed``.

    Args:
        load: loads a corpus, like `stn_fast.data.ptb.load`.

    Raises:
        UserError: as ``load``.
        ValueError: the space or the layers refuse a hyperparameter's range or scale.
    """
    import torch

    from stn_fast.data import placed
    from stn_fast.models import LanguageModel, tuned
    from stn_fast.training import language, task
    from stn_fast.training.spaces import build_space
    from stn_fast.training.streams import ContinuousText

    space, text = build_space(config), config.text
    assert text is not None  # the language recipes have one, and no flag removes it
    corpus = load(config.data_root, min_count=text.min_count, train_fraction=config.train_fraction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = LanguageModel(len(corpus.words), text.width, text.width, text.layers)
        model = tuned(network, space, config.method.response_rank)
    return task.Task(
        space=space,
        model=model.to(config.device),
        data=placed(corpus.data_set(), config.device),
        training_objective=language.regularised_next_word_loss,
        validation_objective=language.next_word_loss,
        scores=language.next_word_scores,
        report=language.with_perplexity,
        loss_unit="nats",
        batching=ContinuousText(text.window, text.valid_streams, text.test_streams),
        facts={"vocabulary": len(corpus.words), "unknown_share": corpus.unknown_share()},
        vocabulary=corpus.words,
    )


def load_files(root: str | None = None, *, min_count: int = 1, train_fraction: float = 1.0) -> Corpus:
    """The corpus in ``root``; see `stn_fast.data.text.load`."""
    from stn_fast.data import text
    from stn_fast.data.download import data_root
    from stn_fast.errors import UserError
    from stn_fast.files import is_file

    paths = [data_root(root) / name for name in FILES]
    for path in paths:
        if not is_file(path):
            raise UserError(
                f"there is no file {path}: the recipe text needs {', '.join(FILES)} in --data-root or STN_FAST_DATA"
            )
    return text.load(*paths, min_count=min_count, train_fraction=train_fraction)


def _ptb_task(config: Config) -> Task:
    from stn_fast.data import ptb

    return build_task(config, ptb.load)


def _wikitext2_task(config: Config) -> Task:
    from stn_fast.data import wikitext2

    return build_task(config, wikitext2.load)


def _text_task(config: Config) -> Task:
    return build_task(config, load_files)


ptb = Recipe(_ptb, _ptb_task)
ptb_small = Recipe(_ptb_small, _ptb_task)
wikitext2 = Recipe(_wikitext2, _wikitext2_task)
text = Recipe(_text, _text_task)
