"""Modules of timm and transformers that have rules. They are recognised without importing the libraries."""

from __future__ import annotations

from torch import nn

from stn_fast.conversion import norms
from stn_fast.conversion.converted import Converted

# By the name of the class that has the forward function.
TIMM_NORMS: dict[str, type[Converted]] = {
    "LayerNorm": norms.LayerNorm,
    "LayerNorm2d": norms.LayerNorm2d,
    "RmsNorm": norms.RMSNorm,
    "RmsNorm2d": norms.RMSNorm2d,
    "GroupNorm": norms.GroupNorm,
    "GroupNorm1": norms.GroupNorm,
    "GroupNormAct": norms.GroupNormAct,
    "GroupNorm1Act": norms.GroupNormAct,
    "BatchNormAct2d": norms.BatchNormAct2d,
}


def is_drop_path(module: nn.Module) -> bool:
    """Whether it is timm's, or one of those of transformers."""
    name, package = type(module).__name__, _package(type(module))
    known = (package == "timm" and name == "DropPath") or (package == "transformers" and name.endswith("DropPath"))
    return known and hasattr(module, "drop_prob")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers', a linear layer with a transposed weight."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and _package(kind) == "transformers" and hasattr(module, "nf")


def norm_of_library(module: nn.Module) -> type[Converted] | None:
    """What a norm of timm or transformers becomes; None for other modules.

    timm's are known by the class that has their forward function; transformers' are all those that have only a weight
    (D,), if they take stacked weights, which `takes_stacked_weights` finds out.
    """
    kind = type(module)
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    if owner.__module__ in ("timm.layers.norm", "timm.layers.norm_act"):
        return TIMM_NORMS.get(owner.__name__)
    if _package(kind) != "transformers" or not kind.__name__.endswith("Norm"):
        return None
    weight = module._parameters.get("weight")
    only_weight = module._parameters.keys() == {"weight"} and not module._buffers and not module._modules
    return norms.OwnNorm if only_weight and weight is not None and weight.ndim == 1 else None


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
