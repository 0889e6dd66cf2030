"""The parameters of a self-tuning model by their roles, and the streams that its layers draw from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.regularisers import _Regulariser

RESPONSE_PARAMETERS = ("response_weight", "response_projection", "response_bias", "weight_gate", "bias_gate")


def is_response(name: str) -> bool:
    """Whether a parameter of this name belongs to the response of a gated layer, not to its weights."""
    return name.rpartition(".")[2].startswith(RESPONSE_PARAMETERS)


def is_gate(name: str) -> bool:
    """Whether a parameter of this name is a gate (O, n), with one column per hyperparameter."""
    return name.rpartition(".")[2].startswith(("weight_gate", "bias_gate"))


def parameter_names(model: nn.Module, parameters: Sequence[Tensor], places: Sequence[int]) -> str:
    """The names in ``model`` of those ``parameters`` that are at ``places``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return listed([names.get(id(parameters[k]), f"parameter {k} of the optimizer") for k in places])


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of ``names`` and how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most]) + "".join(f" and {rest}" for rest in more)


def check_streams(model: nn.Module) -> None:
    """Raises ValueError where two layers of the model would draw the same random numbers."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Regulariser):
            if module.stream in owners:
                raise ValueError(
                    f"{owners[module.stream]!r} and {name!r} both draw from stream {module.stream}, so "
                    "their noise would be one and the same; give every layer a stream of its own"
                )
            owners[module.stream] = name


@contextmanager
def hold_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """No gradient is computed for ``parameters`` inside."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


def check_used(hyper: HyperBatch, all_by_name: bool) -> None:
    """Raises ValueError where a hyperparameter was not looked up: nothing would regulate it but its own entropy.

    Where none was, the objective may have read ``hyper.values``. That is a warning, and an error if ``all_by_name``.
    """
    unused = [repr(name) for name in hyper.space.names if name not in hyper.used]
    if not unused:
        return
    problem = (
        f"nothing in the training objective uses {listed(unused)}, or looks it up as hyper[name] does: give it to "
        "a layer or to the objective, or leave it out of the space"
    )
    if len(unused) < len(hyper.space) or all_by_name:
        raise ValueError(problem)
    warnings.warn(problem + "; allow_unused=True is for an objective that reads hyper.values", stacklevel=4)
