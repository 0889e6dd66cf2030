"""explore_model: an exploration of a converted model of your own, on batches of a loader."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stn_fast.checks import real_number, switch, whole_number
from stn_fast.conversion.folding import tuned_of
from stn_fast.exploration.command import FILES, check_writable, write
from stn_fast.exploration.report import table
from stn_fast.exploration.response import BAND, Exploration, explored
from stn_fast.extras import require
from stn_fast.training.config import Config, MethodConfig
from stn_fast.training.converted import TuningMethod
from stn_fast.training.fit_description import hyperparameters_of
from stn_fast.training.fit_task import loaded, task_of
from stn_fast.training.loaders import Loaded
from stn_fast.training.trainer import Trainer
from stn_fast.training.tuner import Loss, SelfTuner


def explore_model(
    model: nn.Module,
    valid_loader: Iterable[Any],
    *,
    loss: Loss,
    out: str | Path | None = None,
    points: int = 21,
    span: float = 4.0,
    examples: int = 5000,
    pairs: bool = True,
    quiet: bool = False,
) -> Exploration:
    """The validation loss of a converted model against each of its hyperparameters, as its response predicts it.

        stn.explore_model(fit.best.model, valid_loader, loss=F.cross_entropy, out="explored")

    It does for a model of your own, trained by `stn_fast.SelfTuner` or `stn_fast.fit`, what ``python -m
    stn_fast.explore RUN_DIR`` does for the run of a recipe. The weights change as the response predicts; nothing is
    trained, and the model does not change.

    Args:
        model: a converted one, such as ``tuner.model``, ``fit.best.model`` or what `stn_fast.load` returns.
        valid_loader: batches as for `stn_fast.SelfTuner`; they are moved to the device of the model.
        loss: what the hyperparameters minimise, the mean over the examples of a batch.
        out: the folder of explore.png, explore.json and explore.html, which need matplotlib; None to write no files.
        points: points of a curve, from 3.
        span: how far curves reach, in multiples of σ, from 2.
        examples: batches are read until they have as many examples, and evaluated at each point.
        pairs: whether to evaluate a map of the two hyperparameters that matter most.
        quiet: whether to print no table.

    Returns:
        The curves by descending range of the loss within ±2σ, and the map.

    Raises:
        TypeError: the model has not been converted, or a batch is none.
        ValueError: a setting is out of range, the loader gives no batch, or `out` can't be written.
    """
    who = "explore_model"
    centred = bool(tuned_of(who, model).centred)
    whole_number(who, "points", points, 3)
    whole_number(who, "examples", examples, 1)
    switch(who, "pairs", pairs)
    if real_number(who, "span", span) < BAND:
        raise ValueError(f"{who}: span must be >= {BAND:g}, got {span}")
    if out is not None:
        require("matplotlib")
        check_writable(Path(out), "out")
    method: TuningMethod = "delta-stn" if centred else "stn"
    trainer = _trainer(deepcopy(getattr(model, "_orig_mod", model)), valid_loader, loss, method, examples)
    found = explored(trainer, points=points, span=span, examples=examples, pairs=pairs)
    title = f"{type(model).__name__}, {method}"
    about = f"Validation loss {found.loss:.4f} on {found.examples:,} examples."
    if out is not None:
        settings = {"model": type(model).__name__, "method": method, "points": points, "span": span}
        write(found, trainer.method.space, Path(out), title=title, about=about, settings=settings)
    if not switch(who, "quiet", quiet):
        where = "" if out is None else f"\n\n{', '.join(FILES)} are in {out}."
        print(f"{title}\n{about}\n\n{table(found.curves)}{where}")
    return found


def _trainer(model: nn.Module, loader: Iterable[Any], loss: Loss, method: TuningMethod, examples: int) -> Trainer:
    """One that evaluates the model, on the first batches of the loader, and does not train it."""
    optimizer = torch.optim.SGD(model.requires_grad_(True).parameters(), lr=0.0)
    tuner = SelfTuner(model, optimizer, loss, valid_loss=loss, method=method, check_rows=False)
    space, device = tuner.method.space, tuner.method.location.device
    valid = _first(loaded(tuner, "explore_model: valid_loader", loader), examples, device)
    config = Config(
        recipe="explore_model",
        hyperparameters=hyperparameters_of(space),
        method=MethodConfig(name=method),
        device=device.type,  # type: ignore[arg-type]
        capture=False,
    )
    return Trainer(config, task_of(tuner, [valid, valid, None], {}), tuner.method, Path())


def _first(part: Loaded, examples: int, device: torch.device) -> Loaded:
    """The same batches at every evaluation: the first of the loader, until they have as many examples."""
    kept: list[Any] = []
    for entry in part.loader:
        kept.append(entry)
        examples -= part.as_batch(entry).examples
        if examples <= 0:
            break
    return Loaded(part.name, kept, part.as_batch, device)
