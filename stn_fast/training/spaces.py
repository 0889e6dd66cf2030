"""The hyperparameter space that a configuration describes."""

from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.training.config import Config


def build_space(config: Config) -> HyperparameterSpace:
    """One ``Hyperparameter`` for every enabled entry of ``config.hyperparameters``, in order."""
    return HyperparameterSpace([entry.named(name, config.method.response) for name, entry in config.enabled.items()])
