"""What a call of `stn_fast.fit` was given, as names and text, for the configuration of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from stn_fast.conversion import Converted
from stn_fast.conversion.folding import tuned_of
from stn_fast.conversion.rules import OPENED
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperparameterSpace, Response
from stn_fast.training.config import HyperparameterConfig
from stn_fast.training.fit_config import ModuleConfig


def name_of(function: Any) -> str:
    """The name of a function or class, of the class of another object, and the arguments of a partial function."""
    if isinstance(function, partial):
        given = [shown(value) for value in function.args]
        given += [f"{name}={shown(value)}" for name, value in function.keywords.items()]
        return f"{name_of(function.func)}({', '.join(given)})"
    return getattr(function, "__qualname__", type(function).__qualname__)


def shown(value: Any) -> str:
    """A number, text, or a collection of them, as Python writes it; of another value the name."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(shown, value))})"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else name_of(value)


def settings_of_loss(loss: Any) -> str:
    """The name of a loss; of a module also its settings, and the values of its buffers, such as class weights.

    Modules with parameters in it are left out, because training may change what they hold.
    """
    if not isinstance(loss, nn.Module):
        return name_of(loss)
    found: dict[str, str] = {}
    for prefix, module in loss.named_modules():
        if next(module.parameters(), None) is None:
            own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
            given = _plain(own | dict(module.named_buffers(recurse=False)))
            found |= {f"{prefix}.{key}".lstrip("."): value for key, value in given.items()}
    return f"{name_of(loss)}({', '.join(f'{key}={value}' for key, value in found.items())})"


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The class and the settings of an optimizer, and of each group of parameters those that differ from them.

    None and False are left out: a newer torch may add such settings.
    """
    defaults = _plain(optimizer.defaults)
    found = {"class": name_of(type(optimizer)), **defaults}
    for number, group in enumerate(optimizer.param_groups):
        own = _plain({key: value for key, value in group.items() if key != "params"})
        found |= {f"{key} of group {number}": value for key, value in own.items() if defaults.get(key) != value}
    return found


def settings_of_scheduler(scheduler: LRScheduler | None) -> dict[str, str]:
    """The class and the settings of a scheduler, before its first step; empty without one."""
    if scheduler is None:
        return {}
    state = scheduler.state_dict().items()
    given = {key: value for key, value in state if not key.startswith("_") and key not in ("base_lrs", "last_epoch")}
    return {"class": name_of(type(scheduler)), **_plain(given)}


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: shown(value) for key, value in settings.items() if value is not None and value is not False}


def modules_of(model: nn.Module) -> dict[str, ModuleConfig]:
    """The converted modules of a model, by name, without those that only call converted ones in them."""
    rates = {entry.name: entry.hyperparameter for entry in tuned_of("modules_of", model).report}
    opened = tuple(OPENED.values())
    modules = [one for one in model.modules() if isinstance(one, Converted) and not isinstance(one, opened)]
    return {one.dotted_name: ModuleConfig(one.example_dim, rates.get(one.dotted_name)) for one in modules}


def additions_of(model: nn.Module) -> dict[str, str]:
    """The regularisers that were added at the conversion, and the modules of each, by its hyperparameter."""
    added = tuned_of("additions_of", model).added
    return {one.hyperparameter: f"{name_of(type(one.addition))} of {', '.join(one.modules)}" for one in added}


def hyperparameters_of(space: HyperparameterSpace) -> dict[str, HyperparameterConfig]:
    """The hyperparameters, by name."""
    keys = ("init", "low", "high", "scale", "integer", "per_example")
    return {one.name: HyperparameterConfig(**{key: getattr(one, key) for key in keys}) for one in space}


def response_of(space: HyperparameterSpace) -> Response:
    """The response that all hyperparameters have. Raises UserError if they have different ones."""
    responses: Sequence[Response] = list({one.response: None for one in space})
    if len(responses) > 1:
        raise UserError(f"fit: all hyperparameters must have the same response, got {', '.join(responses)}")
    return responses[0]
