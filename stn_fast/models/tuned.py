"""tuned: `convert` for networks whose dropout modules are named like hyperparameters."""

from __future__ import annotations

import glob
import re
from typing import TypeVar

from torch import nn

from stn_fast.conversion import convert
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperparameterSpace

Model = TypeVar("Model", bound=nn.Module)


def tuned(network: Model, space: HyperparameterSpace, response_rank: ResponseRank = None) -> Model:
    """Makes a network of this package self-tuning, in place, by `stn_fast.convert`, and returns it.

    The rate of a module of dropout named `conv_dropout_3` is the hyperparameter of this name, or else `conv_dropout`;
    the same goes for noise. If the space has neither, it stays plain, and keeps its rate, 0 in this package's networks.
    Other hyperparameters are left to the loss; those that nothing uses are an error at the first training step.

    Args:
        network: any module. RATES and EXAMPLE_DIMS of a `LanguageModel` in it, or of a class of your own, give
            {pattern: hyperparameter} for modules with other names, and the `example_dims` of `stn_fast.convert`;
            patterns are for names within that module.
        space: the hyperparameters.
        response_rank: as for `stn_fast.HyperLinear`.

    Raises:
        TypeError: space is something else.
        ValueError: a hyperparameter can't be a rate, and as `stn_fast.convert`.
    """
    if not isinstance(space, HyperparameterSpace):
        raise TypeError(f"tuned: space must be a HyperparameterSpace, got {type(space).__name__}")
    rates: dict[str, str] = {}
    for name, _ in network.named_modules():
        own = name.rpartition(".")[2]
        known = [one for one in (own, re.sub(r"_\d+$", "", own)) if one in space]
        rates |= {name: known[0]} if known else {}
    dims: dict[str, int] = {}
    for name, module in network.named_modules():
        prefix = f"{glob.escape(name)}." if name else ""
        for found, attribute in ((rates, "RATES"), (dims, "EXAMPLE_DIMS")):
            own = getattr(type(module), attribute, None)
            if isinstance(own, dict):
                found |= {f"{prefix}{pattern}": value for pattern, value in own.items()}
    return convert(
        network,
        space,
        dropouts={pattern: name for pattern, name in rates.items() if name in space},
        of_loss=space.names,
        example_dims=dims,
        response_rank=response_rank,
        quiet=True,
    )
