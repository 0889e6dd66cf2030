"""The hyperparameter space that a configuration describes."""

from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.training.config import Config


def build_space(config: Config) -> HyperparameterSpace:
    """One ``Hyperparameter`` for every enabled entry of ``config.hyperparameters``, in order."""
    return HyperparameterSpace(
        [
            Hyperparameter(
                name,
                init=entry.init,
                low=entry.low,
                high=entry.high,
                scale=entry.scale,
                integer=entry.integer,
                per_example=entry.per_example,
                response=config.method.response,
            )
            for name, entry in config.enabled.items()
        ]
    )
