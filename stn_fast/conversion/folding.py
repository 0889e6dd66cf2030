"""fold: a plain copy of a converted model, at its current hyperparameters."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from stn_fast.conversion.converted import Converted
from stn_fast.conversion.output_dropout import remove_output_dropouts
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.ops.arguments import is_sharded

Model = TypeVar("Model", bound=nn.Module)


def tuned_of(who: str, model: nn.Module) -> TunedHyperparameters:
    """The hyperparameters of a converted model. Raises TypeError if it has not been converted."""
    tuned = _own(model)
    inner = getattr(model, "module", None)
    if tuned is None and isinstance(inner, nn.Module) and _own(inner) is not None:
        raise TypeError(f"{who}: the converted model is the attribute module of this {type(model).__name__}: give that")
    if tuned is None:
        raise TypeError(f"{who}: model must be one that stn.convert has converted, got {type(model).__name__}")
    return tuned


def tuned_in(model: nn.Module) -> TunedHyperparameters | None:
    """The hyperparameters of a converted model, or of one inside of torch's `AveragedModel`; None for other models."""
    return _own(model.module if isinstance(model, AveragedModel) else model)


def _own(model: nn.Module) -> TunedHyperparameters | None:
    tuned = getattr(model, "tuned_hyperparameters", None)
    return tuned if isinstance(tuned, TunedHyperparameters) else None


def fold(model: Model) -> Model:
    """A plain copy of a converted model, with the classes that its modules had, at the current hyperparameters λ.

    It computes what ``model.eval()`` computes, with W_eff = W + diag(Gw h) R and b_eff = b + (Gb h) ⊙ r for h at λ;
    its dropout modules have the tuned rates, and the dropout that a `stn_fast.Dropout` added is removed. Names, hooks,
    modes, buffers and tied parameters are kept. Parameters that are tied although their effective values differ are
    separated, with a warning that names them.

    Raises:
        TypeError: the model has not been converted.
        ValueError: its parameters are sharded over processes.
    """
    tuned_of("fold", model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "fold: the parameters are sharded over processes: gather them by torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True, load that into a converted model of your own, and fold it"
        )
    plain = copy.deepcopy(getattr(model, "_orig_mod", model))  # the model that torch.compile wraps
    tuned = tuned_of("fold", plain)
    response, values = tuned.response(), tuned.values()
    converted = [(name, module) for name, module in plain.named_modules() if isinstance(module, Converted)]
    folded = {
        f"{name}.{key}".lstrip("."): tensor
        for name, module in converted
        for key, tensor in module.folded(response).items()
    }
    _put(plain, folded)
    for _, module in converted:
        module.revert(values)
    remove_output_dropouts(plain)
    del plain.tuned_hyperparameters
    return plain


@torch.no_grad()
def _put(model: nn.Module, folded: dict[str, Tensor]) -> None:
    """Sets the parameters with these names. Tied ones stay so if all of their names get the same values."""
    tied: dict[nn.Parameter, list[str]] = {}
    for owner, module in model.named_modules():
        for key, parameter in module.named_parameters(owner, recurse=False, remove_duplicate=False):
            tied.setdefault(parameter, []).append(key)
    for parameter, names in tied.items():
        wanted = [folded.get(name, parameter) for name in names]
        if all(one is wanted[0] or torch.equal(one, wanted[0]) for one in wanted[1:]):
            parameter.copy_(wanted[0])
            continue
        warnings.warn(
            f"fold: {', '.join(names)} were one parameter; at the tuned hyperparameters their values differ, so they "
            "are separate parameters of the folded model",
            stacklevel=3,
        )
        for name in names:
            if name in folded:
                owner, _, key = name.rpartition(".")
                separate = nn.Parameter(folded[name].clone(), requires_grad=parameter.requires_grad)
                setattr(model.get_submodule(owner), key, separate)
