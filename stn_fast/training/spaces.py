"""The hyperparameter space that a configuration describes."""

from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.training.config import Config


def build_space(config: Config) -> HyperparameterSpace:
    """One ``Hyperparameter`` for every enabled entry of ``config.hyperparameters``, in order."""
    # That of delta-stn is centred whatever it is, and weights of other methods do not respond.
    response = config.method.response if config.method.name == "stn" else "shifted"
    return HyperparameterSpace([entry.named(name, response) for name, entry in config.enabled.items()])
