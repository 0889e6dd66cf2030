"""Recipes on images: the STN paper's AlexNet on CIFAR-10, the Δ-STN paper's network on Fashion-MNIST, and a small one.

cifar10               AlexNet and fifteen tuned hyperparameters (STN, section 4.2)
fashion_mnist         a convolutional network, six hyperparameters and weight decay (Δ-STN)
fashion_mnist_small   minutes on a CPU: 5,000 training, 5,000 validation and all 10,000 test images

On CUDA, cifar10 and fashion_mnist use fp32 until their results with bf16 have been measured; fashion_mnist_small uses
bf16, with which its losses are as good (benchmarks/results/precision.json).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from stn_fast.recipes import Recipe
from stn_fast.training.config import (
    Config,
    HyperOptimizerConfig,
    HyperparameterConfig,
    MethodConfig,
    OptimizerConfig,
    ScheduleConfig,
    as_published,
)

if TYPE_CHECKING:
    from torch import nn

    from stn_fast.data import Images
    from stn_fast.training.task import Task

VALID_SIZES = {"cifar10": 10_000, "fashion-mnist": 9_000, "fashion-mnist-small": 5_000}
SMALL_TRAIN_SIZE = 5_000
SMALL_HIDDEN = 256
SPLIT_SEED = 0  # every run uses the same validation images


def _cifar10() -> Config:
    """40,000 training and 10,000 validation images.

    Weight decay is not one of the fifteen: ``--set hyperparameters.weight_decay.enabled=true`` tunes it too. The
    paper's input dropout may reach 1, which erases an image; here it stays below 0.99. The two integers start at 4.5
    and 1.5, in the middle of the values that are rounded down to the paper's 4 and 1.
    """
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.9)
    jitter = HyperparameterConfig(init=0.05, low=0.0, high=1.0)
    defaults = Config(
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
    return as_published(defaults)


def _fashion_mnist() -> Config:
    """51,000 training and 9,000 validation images.

    The paper's six hyperparameters, and weight decay, which ``--set hyperparameters.weight_decay.enabled=false`` leaves
    out. The two integers start at 4.5 and 1.5, in the middle of the values that are rounded down to the paper's 4 and
    1.
    """
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.95, scale=1.0)
    defaults = Config(
        recipe="fashion-mnist",
        hyperparameters={
            "input_dropout": dropout,
            "conv_dropout_1": dropout,
            "conv_dropout_2": dropout,
            "last_dropout": dropout,
            "cutout_length": HyperparameterConfig(init=4.5, low=2.0, high=24.0, scale=1.0, integer=True),
            "cutout_holes": HyperparameterConfig(init=1.5, low=0.0, high=5.0, scale=1.0, integer=True),
            "weight_decay": HyperparameterConfig(init=1e-4, low=0.0, scale=1.0),
        },
        method=MethodConfig(train_steps=5, valid_steps=1, warmup_epochs=5, entropy_weight=1e-3),
        optimizer=OptimizerConfig(learning_rate=0.01, momentum=0.9),
        hyper_optimizer=HyperOptimizerConfig(name="rmsprop", learning_rate=1e-2),
        schedule=ScheduleConfig(epochs=200, batch_size=128, valid_batch_size=128),
    )
    return as_published(defaults)


def _fashion_mnist_small() -> Config:
    """The network of ``fashion-mnist`` with a hidden layer of 256 and one dropout rate for both convolutions."""
    dropout = HyperparameterConfig(init=0.05, low=0.0, high=0.95)
    defaults = Config(
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
        precision="auto",
    )
    return as_published(defaults)


def build_task(
    config: Config,
    images: Images,
    make_network: Callable[[], nn.Module],
    *,
    valid_size: int,
    train_size: int | None = None,
) -> Task:
    """Classification of ``images`` by a network with augmentation; its weights are drawn from ``config.seed``.

    Args:
        make_network: makes a plain network of normalised images, like `alexnet`; `tuned` says how its dropout modules
            are named.
        valid_size: number of the training images to use for validation.
        train_size: number of the others to train on, None for all; ``config.train_fraction`` is a fraction of these.

    Raises:
        ValueError: the space or the layers refuse a hyperparameter's range or scale.
    """
    import torch

    from stn_fast.data import DataSet, Split, fraction, placed, split_validation
    from stn_fast.models import ImageClassifier, tuned
    from stn_fast.training import task
    from stn_fast.training.spaces import build_space

    space = build_space(config)
    train, valid = split_validation(images.train, valid_size, SPLIT_SEED)
    train = fraction(Split(*(part[:train_size] for part in train)), config.train_fraction, SPLIT_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = make_network()
        side = min(train.inputs.shape[-2:])
        classifier = ImageClassifier(space, network, mean=images.mean, std=images.std, image_size=side)
        model = tuned(classifier, space, config.method.response_rank)
    return task.Task(
        space=space,
        model=model.to(config.device),
        data=placed(DataSet(train, valid, images.test), config.device),
        training_objective=task.decayed_classification_loss,
        validation_objective=task.classification_loss,
        scores=task.classification_scores,
        loss_unit="nats",
    )


def _cifar10_task(config: Config) -> Task:
    from stn_fast.data import cifar10
    from stn_fast.models import alexnet

    return build_task(config, cifar10.load(config.data_root), alexnet, valid_size=VALID_SIZES[config.recipe])


def _fashion_mnist_task(config: Config) -> Task:
    from stn_fast.data import fashion_mnist
    from stn_fast.models import fashion_cnn

    images = fashion_mnist.load(config.data_root)
    return build_task(config, images, fashion_cnn, valid_size=VALID_SIZES[config.recipe])


def _fashion_mnist_small_task(config: Config) -> Task:
    from stn_fast.data import fashion_mnist
    from stn_fast.models import fashion_cnn

    images, network = fashion_mnist.load(config.data_root), partial(fashion_cnn, hidden=SMALL_HIDDEN)
    return build_task(config, images, network, valid_size=VALID_SIZES[config.recipe], train_size=SMALL_TRAIN_SIZE)


cifar10 = Recipe(_cifar10, _cifar10_task)
fashion_mnist = Recipe(_fashion_mnist, _fashion_mnist_task)
fashion_mnist_small = Recipe(_fashion_mnist_small, _fashion_mnist_small_task)
