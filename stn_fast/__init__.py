"""Self-Tuning Networks: regularisation hyperparameters tuned during one training run.

Importing this package loads neither torch nor any kernel; each name below is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stn_fast import functional as functional
    from stn_fast.conversion import Augment as Augment
    from stn_fast.conversion import ConvReLU2d as ConvReLU2d
    from stn_fast.conversion import DropConnectLSTM as DropConnectLSTM
    from stn_fast.conversion import Dropout as Dropout
    from stn_fast.conversion import EmbeddingWithDropout as EmbeddingWithDropout
    from stn_fast.conversion import GaussianNoise as GaussianNoise
    from stn_fast.conversion import LabelSmoothing as LabelSmoothing
    from stn_fast.conversion import LockedDropout as LockedDropout
    from stn_fast.conversion import WeightDecay as WeightDecay
    from stn_fast.conversion import convert as convert
    from stn_fast.conversion import converts as converts
    from stn_fast.conversion import fold as fold
    from stn_fast.conversion import suggest_space as suggest_space
    from stn_fast.dispatch import backends as backends
    from stn_fast.dispatch import use_backend as use_backend
    from stn_fast.exploration.model import explore_model as explore_model
    from stn_fast.hyperparameters import HyperBatch as HyperBatch
    from stn_fast.hyperparameters import Hyperparameter as Hyperparameter
    from stn_fast.hyperparameters import HyperparameterSpace as HyperparameterSpace
    from stn_fast.layers import DropConnect as DropConnect
    from stn_fast.layers import EmbeddingDropout as EmbeddingDropout
    from stn_fast.layers import HyperBatchNorm2d as HyperBatchNorm2d
    from stn_fast.layers import HyperConv2d as HyperConv2d
    from stn_fast.layers import HyperEmbedding as HyperEmbedding
    from stn_fast.layers import HyperLinear as HyperLinear
    from stn_fast.layers import HyperLSTM as HyperLSTM
    from stn_fast.layers import PerExampleAugmentation as PerExampleAugmentation
    from stn_fast.layers import PerExampleDropout as PerExampleDropout
    from stn_fast.layers import PerExampleDropout2d as PerExampleDropout2d
    from stn_fast.layers import PerExampleNoise as PerExampleNoise
    from stn_fast.loading import load as load
    from stn_fast.training.fit import fit as fit
    from stn_fast.training.tuner import SelfTuner as SelfTuner
    from stn_fast.training.tuner import alternate as alternate

__version__ = "0.1.0"

_HOME = {
    "backends": "stn_fast.dispatch",
    "use_backend": "stn_fast.dispatch",
    "Augment": "stn_fast.conversion",
    "ConvReLU2d": "stn_fast.conversion",
    "DropConnectLSTM": "stn_fast.conversion",
    "Dropout": "stn_fast.conversion",
    "EmbeddingWithDropout": "stn_fast.conversion",
    "GaussianNoise": "stn_fast.conversion",
    "LabelSmoothing": "stn_fast.conversion",
    "LockedDropout": "stn_fast.conversion",
    "WeightDecay": "stn_fast.conversion",
    "convert": "stn_fast.conversion",
    "converts": "stn_fast.conversion",
    "fold": "stn_fast.conversion",
    "suggest_space": "stn_fast.conversion",
    "explore_model": "stn_fast.exploration.model",
    "HyperBatch": "stn_fast.hyperparameters",
    "Hyperparameter": "stn_fast.hyperparameters",
    "HyperparameterSpace": "stn_fast.hyperparameters",
    "DropConnect": "stn_fast.layers",
    "EmbeddingDropout": "stn_fast.layers",
    "HyperBatchNorm2d": "stn_fast.layers",
    "HyperConv2d": "stn_fast.layers",
    "HyperEmbedding": "stn_fast.layers",
    "HyperLSTM": "stn_fast.layers",
    "HyperLinear": "stn_fast.layers",
    "PerExampleAugmentation": "stn_fast.layers",
    "PerExampleDropout": "stn_fast.layers",
    "PerExampleDropout2d": "stn_fast.layers",
    "PerExampleNoise": "stn_fast.layers",
    "load": "stn_fast.loading",
    "fit": "stn_fast.training.fit",
    "SelfTuner": "stn_fast.training.tuner",
    "alternate": "stn_fast.training.tuner",
}
_MODULES = ("conversion", "data", "functional", "layers", "models", "recipes", "training")

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"stn_fast.{name}")
    raise AttributeError(f"module 'stn_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
