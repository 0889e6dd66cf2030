"""The parameters of a self-tuning model by their roles, and the random streams of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from stn_fast.conversion.folding import tuned_in
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.regularisers import _Regulariser

RESPONSE_PARAMETERS = ("response_weight", "response_projection", "response_bias", "weight_gate", "bias_gate")


def is_response(name: str) -> bool:
    """Whether a parameter of this name belongs to the response of a gated layer, not to its weights.

    A parametrized one does, whose name is like ``parametrizations.response_weight.original0``.
    """
    return any(part.startswith(RESPONSE_PARAMETERS) for part in name.split("."))


def is_gate(name: str) -> bool:
    """Whether a parameter of this name is a gate (O, n), with one column per hyperparameter."""
    return name.rpartition(".")[2].startswith(("weight_gate", "bias_gate"))


def parameter_names(model: nn.Module, parameters: Sequence[Tensor], places: Sequence[int]) -> str:
    """The names in ``model`` of the ``parameters`` with indices ``places``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return listed([names.get(id(parameters[k]), f"parameter {k} of the optimizer") for k in places])


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of ``names``, and the number of others."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most]) + "".join(f" and {rest}" for rest in more)


def check_streams(model: nn.Module) -> None:
    """Raises ValueError if two layers of the model would draw the same random numbers."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Regulariser):
            if module.stream in owners:
                raise ValueError(
                    f"{owners[module.stream]!r} and {name!r} both draw from stream {module.stream}, so "
                    "they would draw the same numbers; give every layer its own stream"
                )
            owners[module.stream] = name


@contextmanager
def hold_parameters(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, no gradient is computed for ``parameters``."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


def check_used(hyper: HyperBatch, model: nn.Module, all_by_name: bool = False) -> None:
    """Raises ValueError if a hyperparameter was not looked up, because then only the entropy would move it.

    If none was looked up, the loss may have read ``hyper.values``: a warning, or an error if ``all_by_name`` or the
    model is a converted one, whose names may all be misspelt.
    """
    unused = [repr(name) for name in hyper.space.names if name not in hyper.used]
    if not unused:
        return
    tuned = tuned_in(model)
    untuned = [] if tuned is None else tuned.untuned
    others = f" Modules whose rate is no hyperparameter: {listed(untuned, 8)}." if untuned else ""
    problem = (
        f"nothing uses {listed(unused)}: no layer and no term of the training loss looks it up, as hyper[name] does."
        f"{others} Correct the name, use it there, or leave it out of the space"
    )
    if len(unused) < len(hyper.space) or all_by_name or tuned is not None:
        raise ValueError(problem)
    warnings.warn(problem + "; allow_unused=True is for a loss that reads hyper.values", stacklevel=4)
