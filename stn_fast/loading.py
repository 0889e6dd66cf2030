"""load: trained networks from run directories."""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stn_fast.conversion import convert
from stn_fast.conversion.folding import tuned_in
from stn_fast.data import DataSet
from stn_fast.errors import UserError
from stn_fast.files import exists, expanded
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.recipes import recipe
from stn_fast.training import checkpoint
from stn_fast.training.averaging import averaged_model
from stn_fast.training.build import build_method
from stn_fast.training.config import Config
from stn_fast.training.fit_description import additions_of, modules_of
from stn_fast.training.layering import build, read_yaml
from stn_fast.training.run_directory import RunDirectory
from stn_fast.training.spaces import build_space
from stn_fast.training.task import Task
from stn_fast.training.trained import TrainedRecipe, Which, restore, saved_state


def load(
    run_dir: str | Path,
    model: nn.Module | None = None,
    which: Which = "best",
    device: str | torch.device = "cpu",
) -> Any:
    """The network that a run has trained, in evaluation mode, at its best validation loss.

        model = stn.load("runs/mine", model=build())  # of stn.fit
        trained = stn.load("runs/digits-stn-seed0")  # of python -m stn_fast.train digits
        plain = trained.fold()

    A run of `stn_fast.fit` gives a converted network: it is called as the plain one, and `stn_fast.fold` makes it plain
    again. It needs ``model``, a network of the same architecture, plain or converted; a converted one, if regularisers
    were added at its conversion.

    Any other run gives a `TrainedRecipe`: the network as ``trained.model``. A recipe builds the network, for which it
    reads its data from where the run did; with your own recipe, or without the data, give ``model``, a network like the
    one that the recipe builds. With moving averages of weights, the network has those.

    Args:
        run_dir: a run directory; it is only read.
        model: it does not change.
        which: "best" for the checkpoint with the lowest validation loss, "last" for the newest one.
        device: where to put the network; "cpu" or "cuda" for a recipe.

    Raises:
        UserError: the directory holds no run or no checkpoint; the best checkpoint is damaged, or all are; ``model`` is
            missing or of another architecture; there is no such recipe.
    """
    path = expanded(run_dir, "run_dir")
    settings = RunDirectory(path, write=False).config
    if not exists(settings):
        raise UserError(f"load: {path} is not a run directory: it has no {settings.name}")
    config = build(Config, read_yaml(str(settings)))
    if config.fit is None:
        return _of_recipe(config, path, model, which, str(device))
    if not isinstance(model, nn.Module):
        raise UserError(
            f"load: {path} holds a run of stn.fit: give model, a network like the {config.fit.model} that it has "
            f"trained, got {type(model).__name__}"
        )
    return restore(_converted(copy.deepcopy(model), config, path).to(device), path, which).model


def _of_recipe(config: Config, path: Path, model: nn.Module | None, which: Which, device: str) -> TrainedRecipe:
    config = replace(config, device=device)  # type: ignore[arg-type]
    found, state = saved_state(path, which, device)
    task = _recipes_task(config, path) if model is None else _task_of(copy.deepcopy(model).to(device), config)
    method = build_method(config, task)
    average, network = config.optimizer.average, task.model
    with checkpoint.fitting(found):
        method.load_state_dict(state["method"])
        if average:
            averaged = averaged_model(network, average)
            averaged.load_state_dict(state["averaged"])
            network = averaged.module
            if (tuned := tuned_in(network)) is not None:  # which is not averaged
                tuned.location.copy_(method.location.detach())
                tuned.raw_scale.copy_(method.raw_scale.detach())
    return TrainedRecipe(network.eval(), method)


def _recipes_task(config: Config, path: Path) -> Task:
    try:
        made = recipe(config.recipe)
    except UserError as error:
        raise UserError(f"load: {path} holds a run of an {error}; or give model, a network like its own") from None
    return made.build(config)


def _task_of(model: nn.Module, config: Config) -> Task:
    """A task whose data and objectives are never used."""
    none: Any = None
    return Task(build_space(config), model, DataSet(none, none, none), none, none, none)


def _converted(model: nn.Module, config: Config, path: Path) -> nn.Module:
    """The model, converted as that of the run was."""
    assert config.fit is not None
    space = build_space(config)
    tuned = tuned_in(model)
    if tuned is not None:
        if tuned.space != space:
            raise UserError(f"load: model is not converted as in {path}: with {_difference(tuned.space, space)}")
        _check_same("module", modules_of(model), config.fit.modules, path)
        _check_same("addition of", additions_of(model), config.fit.additions, path)
        return model
    names = config.fit.modules.keys()
    others = [name for name, _ in model.named_modules() if name not in names]
    modules = {glob.escape(name): one for name, one in config.fit.modules.items()}
    try:
        with torch.random.fork_rng(devices=[]):
            return convert(
                model,
                space,
                dropouts={name: one.rate for name, one in modules.items() if one.rate is not None},
                include=list(modules),
                exclude=[glob.escape(one) for one in others if not any(name.startswith(f"{one}.") for name in names)],
                example_dims={name: one.example_dim for name, one in modules.items()},
                of_loss=[name for name in space.names if name not in config.fit.additions],
                response_rank=config.method.response_rank,
                quiet=True,
            )
    except ValueError as error:
        raise UserError(
            f"load: model does not fit the run in {path}, of a {config.fit.model}: {error}. If the conversion added "
            "regularisers, give the model converted in the same way"
        ) from error


def _check_same(kind: str, own: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raises UserError if the conversions differ; the message names the first of ``kind`` that does."""
    for name in (*wanted, *own):
        mine, theirs = (repr(given[name]) if name in given else "none" for given in (own, wanted))
        if mine != theirs:
            raise UserError(
                f"load: model is not converted as in {path}: {kind} {name!r} is {mine}, where the run has {theirs}"
            )


def _difference(own: HyperparameterSpace, wanted: HyperparameterSpace) -> str:
    """The first difference of two spaces."""
    if own.names != wanted.names:
        return f"{', '.join(own.names)}, where the run has {', '.join(wanted.names)}, in this order"
    mine, theirs = next((one, other) for one, other in zip(own, wanted, strict=True) if one != other)
    return f"{mine}, where the run has {theirs}"
