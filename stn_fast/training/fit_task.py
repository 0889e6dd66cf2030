"""The task of a call of `stn_fast.fit`: its loaders, objectives and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fast.conversion.folding import tuned_of
from stn_fast.data import DataSet
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperBatch
from stn_fast.training.batches import Batch, Examples
from stn_fast.training.fit_description import name_of
from stn_fast.training.generators import OwnStates, default_generators
from stn_fast.training.loaders import STEPS, Loaded, LoaderBatching
from stn_fast.training.task import Task
from stn_fast.training.tuner import SelfTuner, called

Metric = Callable[[Any, Any], Any]

# Names after valid_ or test_ that are not free for metrics.
TAKEN = ("loss", "steps", "examples")


def checked_metrics(metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
    """Returns ``metrics``; raises TypeError or ValueError if one is not a function, or its name is taken."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"fit: metrics must be {{name: function of outputs and targets}}, got {metrics!r}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or name in TAKEN:
            raise ValueError(
                f"fit: a metric can't be called {name!r}: rows and results have {', '.join(TAKEN)} already"
            )
        if not callable(metric):
            raise TypeError(f"fit: metrics[{name!r}] must be a function of outputs and targets, got {name_of(metric)}")
    return metrics


def check_scores(result: Mapping[str, Any], metrics: Mapping[str, Metric], with_test: bool, directory: Path) -> None:
    """Raises UserError if the result of a finished run lacks a metric, or the scores of a test loader."""
    wanted = [f"valid_{name}" for name in metrics]
    wanted += [f"test_{name}" for name in ("loss", *metrics)] if with_test else []
    if missing := [name for name in wanted if name not in result]:
        raise UserError(
            f"fit: {directory} holds a finished run without {', '.join(missing)}: choose another run_dir, start over "
            "with resume=False, or leave metrics and test_loader as they were and evaluate fit.best.model yourself"
        )


def loaded(tuner: SelfTuner, name: str, loader: Any) -> Loaded:
    """The loader that errors call ``name``, with batches as `SelfTuner` takes them, on the model's device."""
    device = tuner.method.location.device

    def as_batch(entry: Any) -> Batch:
        entry = dict(entry) if isinstance(entry, Mapping) else entry
        return tuner._batch(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), entry))

    return Loaded(name, loader, as_batch, device)


def task_of(tuner: SelfTuner, parts: Sequence[Any], metrics: Mapping[str, Metric]) -> Task:
    """The task of training, validation and test ``parts``; the last one may be None."""
    tuned, method, valid_loss = tuned_of("fit", tuner.model), tuner.method, tuner.valid_loss
    assert valid_loss is not None
    generators = default_generators(method.location.device)

    def around_step(step: int) -> OwnStates:
        """For layers that draw from torch's generators, such as dropout modules that are not converted."""
        return OwnStates(generators, (method.seed, STEPS, step))

    def training_objective(model: nn.Module, batch: Examples, hyper: HyperBatch) -> Any:
        with tuned.using(hyper), around_step(0):
            return method._loss("training", method.training_objective, model, batch, hyper)

    def scores(model: nn.Module, batch: Any, hyper: HyperBatch) -> dict[str, Tensor]:
        """Sums over the batch."""
        with tuned.using(hyper):
            outputs = called(model, batch.inputs)
            means = {"loss": valid_loss(outputs, batch.targets)}
            means |= {name: metric(outputs, batch.targets) for name, metric in metrics.items()}
        return {name: batch.examples * _number(name, mean) for name, mean in means.items()}

    return Task(
        space=method.space,
        model=tuner.model,
        data=DataSet(*parts),
        training_objective=training_objective,
        validation_objective=method.validation_objective,
        scores=scores,
        batching=LoaderBatching(method.seed),
        around_step=around_step,
    )


def _number(name: str, value: Any) -> Tensor:
    """A loss or a metric of a batch in float64, with its gradient."""
    try:
        number = value.double() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.double)
        return number.reshape(())
    except (TypeError, ValueError, RuntimeError):
        what = "the validation loss" if name == "loss" else f"metrics[{name!r}]"
        got = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"fit: {what} must be one number, the mean over the examples of a batch, got {got}") from None
