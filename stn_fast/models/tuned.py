"""tuned: `convert` for networks whose dropout modules are named like hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    Other hyperparameters are left to the loss; the first training step finds those that nothing uses.

    Args:
        network: any module. Its class attribute RATES, if it has one, gives {pattern: hyperparameter} for modules with
            other names, and EXAMPLE_DIMS is the `example_dims` of `stn_fast.convert`.
        space: the hyperparameters.
        response_rank: as for `stn_fast.HyperLinear`.

    Raises:
        ValueError: a hyperparameter can't be a rate, and as `stn_fast.convert`.
    """
    rates: dict[str, str] = {}
    for name, _ in network.named_modules():
        own = name.rpartition(".")[2]
        known = [one for one in (own, re.sub(r"_\d+$", "", own)) if one in space]
        rates |= {name: known[0]} if known else {}
    others: Mapping[str, str] = getattr(type(network), "RATES", {})
    return convert(
        network,
        space,
        dropouts=rates | {pattern: name for pattern, name in others.items() if name in space},
        of_loss=space.names,
        example_dims=getattr(type(network), "EXAMPLE_DIMS", None),
        response_rank=response_rank,
        quiet=True,
    )
