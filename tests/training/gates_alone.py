"""The methods for small networks whose hyperparameters act on the gates alone, which is an error for everybody else."""

from functools import partial

from stn_fast.training import methods

FixedHyperparameters = partial(methods.FixedHyperparameters, allow_unused=True)
SelfTuning = partial(methods.SelfTuning, allow_unused=True)
