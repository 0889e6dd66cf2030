"""The part of a run's configuration that describes a call of `stn_fast.fit`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleConfig:
    """A converted module: the dimension of its input that counts examples, and the hyperparameter that is its rate."""

    example_dim: int = 0
    rate: str | None = None


@dataclass(frozen=True)
class FitConfig:
    """What a run of `stn_fast.fit` depends on besides numbers: names of classes and functions, and settings as text.

    ``modules`` are the converted modules by name, and ``additions`` the regularisers that the conversion added, by the
    name of their hyperparameter. ``train_batches`` and ``valid_batches`` are the batches in a pass.
    """

    model: str
    modules: Mapping[str, ModuleConfig]
    additions: Mapping[str, str]
    loss: str
    valid_loss: str
    optimizer: Mapping[str, str]
    response_optimizer: Mapping[str, str]
    hyper_optimizer: Mapping[str, str]
    scheduler: Mapping[str, str]
    train_batches: int
    valid_batches: int
