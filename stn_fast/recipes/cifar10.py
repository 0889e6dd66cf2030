"""cifar10: the STN paper's AlexNet on CIFAR-10, with its fifteen tuned hyperparameters (section 4.2)."""

from __future__ import annotations

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

VALID_SIZE = 10_000


def config() -> Config:
    """40,000 images to train on and 10,000 to tune on.

    Weight decay is not one of the fifteen: ``--set hyperparameters.weight_decay.enabled=true`` tunes it too. The
    paper's input dropout may reach 1, where nothing is left of an image; here it stays below 0.99. The two integers
    start at 4.5 and 1.5, in the middle of what is floored to the paper's 4 and 1.
    """
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.9)
    jitter = HyperparameterConfig(init=0.05, low=0.0, high=1.0)
    return Config(
        recipe="cifar10",
        hyperparameters={
            **{f"conv_dropout_{i}": dropout for i in range(1, 6)},
            **{f"fc_dropout_{i}": dropout for i in range(1, 3)},
            "input_dropout": HyperparameterConfig(init=0.05, low=0.0, high=0.99),
            "input_scale": HyperparameterConfig(init=0.05, low=0.0, high=0.3),
            "hue": HyperparameterConfig(init=0.05, low=0.0, high=0.5),
            "contrast": jitter,
            "saturation": jitter,
            "brightness": jitter,
            "cutout_length": HyperparameterConfig(init=4.5, low=0.0, high=24.0, integer=True),
            "cutout_holes": HyperparameterConfig(init=1.5, low=0.0, high=4.0, integer=True),
            "weight_decay": HyperparameterConfig(init=5e-4, low=0.0, enabled=False),
        },
        method=MethodConfig(train_steps=2, valid_steps=1, warmup_epochs=5, entropy_weight=1e-3),
        optimizer=OptimizerConfig(
            learning_rate=0.01, momentum=0.9, decay_factor=0.1, decay_patience=60, min_learning_rate=1e-5
        ),
        hyper_optimizer=HyperOptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(epochs=500, patience=75, batch_size=128, valid_batch_size=128),
    )


def build(config: Config) -> Task:
    """The task on ``config.device``; weights are drawn from ``config.seed``.

    Raises:
        UserError: the data are damaged, or missing and not to be had.
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    from stn_fast.data import cifar10
    from stn_fast.models import alexnet
    from stn_fast.recipes._images import build_task

    return build_task(config, cifar10.load(config.data_root), alexnet, valid_size=VALID_SIZE)
