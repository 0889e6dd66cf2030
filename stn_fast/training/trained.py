"""Networks read back from the checkpoints of a run directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from stn_fast.conversion.folding import fold, tuned_of
from stn_fast.errors import UserError, did_you_mean
from stn_fast.files import exists, read_bytes
from stn_fast.hyperparameters import HyperBatch
from stn_fast.training import checkpoint
from stn_fast.training.methods import Method
from stn_fast.training.run_directory import RunDirectory
from stn_fast.values import from_json

Which = Literal["best", "last"]


class Trained(NamedTuple):
    """A converted network that `stn_fast.fit` has trained, in evaluation mode, and the step that it is from."""

    model: nn.Module
    step: int

    def values(self) -> dict[str, float]:
        """The tuned hyperparameters, by name."""
        return tuned_of("Trained", self.model).values()

    def fold(self) -> nn.Module:
        """A plain copy of the network at its hyperparameters, see `stn_fast.fold`."""
        return fold(self.model)


class TrainedRecipe(NamedTuple):
    """A trained network, in evaluation mode, and the method that has trained it.

    A converted one, as those of this package's recipes, is called as the plain network, ``trained.model(inputs)``, and
    uses the tuned hyperparameters. One of gated layers is called with them, ``trained.model(inputs, hyper)`` with
    ``hyper = trained.hyper(len(inputs))``.
    """

    model: nn.Module
    method: Method

    def fold(self) -> nn.Module:
        """A plain copy of a converted network at its hyperparameters, see `stn_fast.fold`."""
        return fold(self.model)

    def hyper(self, batch_size: int) -> HyperBatch:
        """The tuned hyperparameters for ``batch_size`` examples."""
        return self.method.unperturbed(batch_size)

    def values(self) -> dict[str, float]:
        """The tuned hyperparameters, by name."""
        return self.method.space.values(self.method.location)


def saved_state(
    directory: Path, which: Which, device: torch.device | str, warn: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The checkpoint with the best validation loss, or the last one, and its state.

    If the last one is damaged, it is the one before, with a warning, or a call of ``warn``.

    Raises:
        UserError: there is none, the best one is damaged, or all are.
    """
    if which not in get_args(Which):
        raise UserError(f"which = {which!r}: {did_you_mean(str(which), get_args(Which))}")
    root = RunDirectory(directory, write=False).checkpoints
    newest = checkpoint.read_newest(root, device, warn or (lambda text: warnings.warn(text, stacklevel=4)))
    if newest is None:
        raise UserError(
            f"{directory} holds no checkpoint; let the run finish its first evaluation, or restore checkpoints/"
        )
    best = _best_step(directory, newest[1])
    path = checkpoint.path_of(root, best)
    if which == "last" or path == newest[0]:
        return newest
    try:
        return path, checkpoint.read(path, device)
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(
            f"the best checkpoint is lost: {error}; use the last one (which='last', or explore without --best), or run "
            "the training again, which falls back to the best of the others"
        ) from None


def _best_step(directory: Path, newest: dict[str, Any]) -> int:
    """That of the result, if the run has finished: it may have replaced a damaged checkpoint by another one."""
    result = RunDirectory(directory, write=False).result
    try:
        return int(from_json(read_bytes(result))["best_step"]) if exists(result) else newest["best"]["step"]
    except (ValueError, LookupError, TypeError):
        return newest["best"]["step"]


def restore(model: nn.Module, directory: Path, which: Which) -> Trained:
    """Loads a checkpoint of `stn_fast.fit` into a converted model, and puts it in evaluation mode.

    Either of the two may be of a model wrapped by torch.compile.

    Raises:
        UserError: as ``saved_state``, or the checkpoint does not fit the model.
    """
    path, state = saved_state(directory, which, tuned_of("restore", model).location.device)
    saved = {name.removeprefix("_orig_mod."): tensor for name, tensor in state["method"]["model"].items()}
    try:
        getattr(model, "_orig_mod", model).load_state_dict(saved)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this model ({checkpoint.one_line(error)})") from error
    return Trained(model.eval(), state["train_steps"] + state["valid_steps"])
