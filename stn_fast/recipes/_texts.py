"""What the language recipes share: the paper's hyperparameters and network, and the steps from a corpus to a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stn_fast.training.config import (
    Config,
    HyperOptimizerConfig,
    HyperparameterConfig,
    MethodConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from stn_fast.data.text import Corpus
    from stn_fast.training.task import Task


def hyperparameters() -> dict[str, HyperparameterConfig]:
    """The seven of the paper's table, in its order; σ is 1 and held.

    Rates of words and of weights, which all examples share, and the weights α and β of the penalties on activations are
    drawn once for a batch.
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


def published(recipe: str) -> Config:
    """The paper's settings for Penn Treebank, for ``recipe``."""
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


def build_task(config: Config, load: Callable[..., Corpus]) -> Task:
    """The task of naming the next word; weights are drawn from ``config.seed``.

    Args:
        load: reads a corpus, as `stn_fast.data.ptb.load`.

    Raises:
        UserError: what ``load`` raises.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    import torch

    from stn_fast.data import placed
    from stn_fast.models.language_model import LanguageModel
    from stn_fast.training import language, task
    from stn_fast.training.spaces import build_space
    from stn_fast.training.streams import ContinuousText

    space, text = build_space(config), config.text
    assert text is not None  # the language recipes have one, and no flag removes it
    corpus = load(config.data_root, min_count=text.min_count, train_fraction=config.train_fraction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LanguageModel(space, len(corpus.words), text.width, text.width, text.layers)
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
