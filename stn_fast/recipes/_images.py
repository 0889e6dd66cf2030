"""What the image recipes share: the steps from a configuration and published images to a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from stn_fast.data import Images
    from stn_fast.hyperparameters import HyperparameterSpace
    from stn_fast.training.config import Config
    from stn_fast.training.task import Task

SPLIT_SEED = 0  # every run sets the same images aside


def build_task(
    config: Config,
    images: Images,
    make_network: Callable[[HyperparameterSpace], nn.Module],
    *,
    valid_size: int,
    train_size: int | None = None,
) -> Task:
    """Classification of ``images`` by an augmented network; its weights are drawn from ``config.seed``.

    Args:
        valid_size: images set aside for validation, out of those for training.
        train_size: how many of the others are trained on; None for all. ``config.train_fraction`` is a share of them.

    Raises:
        ValueError: a hyperparameter's range or scale is not one that the space or the layers take.
    """
    import torch

    from stn_fast.data import DataSet, Split, fraction, placed, split_validation
    from stn_fast.models import ImageClassifier
    from stn_fast.training import task
    from stn_fast.training.spaces import build_space

    space = build_space(config)
    train, valid = split_validation(images.train, valid_size, SPLIT_SEED)
    train = fraction(Split(*(part[:train_size] for part in train)), config.train_fraction, SPLIT_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = make_network(space)
    side = min(train.inputs.shape[-2:])
    model = ImageClassifier(space, network, mean=images.mean, std=images.std, image_size=side)
    return task.Task(
        space=space,
        model=model.to(config.device),
        data=placed(DataSet(train, valid, images.test), config.device),
        training_objective=task.decayed_classification_loss,
        validation_objective=task.classification_loss,
        scores=task.classification_scores,
        loss_unit="nats",
    )
