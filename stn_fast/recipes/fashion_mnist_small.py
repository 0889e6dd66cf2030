"""fashion-mnist-small: minutes on a CPU. 5,000 images to train on, 5,000 to tune on, all 10,000 test images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from stn_fast.training.config import (
    Config,
    HyperOptimizerConfig,
    HyperparameterConfig,
    MethodConfig,
    OptimizerConfig,
    ScheduleConfig,
)

if TYPE_CHECKING:
    from stn_fast.training.task import Task

TRAIN_SIZE = VALID_SIZE = 5_000
HIDDEN = 256


def config() -> Config:
    """The network of ``fashion-mnist`` with a hidden layer of 256, one rate of dropout for both convolutions."""
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.95)
    return Config(
        recipe="fashion-mnist-small",
        hyperparameters={
            "input_dropout": dropout,
            "conv_dropout": dropout,
            "last_dropout": dropout,
            "weight_decay": HyperparameterConfig(init=1e-4, low=0.0),
            "cutout_length": HyperparameterConfig(init=2.5, low=0.0, high=14.0, integer=True),
            "cutout_holes": HyperparameterConfig(init=1.5, low=0.0, high=4.0, integer=True),
        },
        method=MethodConfig(train_steps=2, valid_steps=1, warmup_epochs=2, entropy_weight=1e-3),
        optimizer=OptimizerConfig(learning_rate=0.03, momentum=0.9),
        hyper_optimizer=HyperOptimizerConfig(learning_rate=3e-2),
        schedule=ScheduleConfig(epochs=40, batch_size=128, valid_batch_size=128),
    )


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are damaged, or missing and not to be had.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    from stn_fast.data import fashion_mnist
    from stn_fast.models import fashion_cnn
    from stn_fast.recipes._images import build_task

    network = partial(fashion_cnn, hidden=HIDDEN)
    images = fashion_mnist.load(config.data_root)
    return build_task(config, images, network, valid_size=VALID_SIZE, train_size=TRAIN_SIZE)
