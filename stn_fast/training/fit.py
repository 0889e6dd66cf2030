"""fit: training of a converted model by the trainer, with a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stn_fast.checks import switch, whole_number
from stn_fast.conversion.folding import tuned_of
from stn_fast.errors import UserError
from stn_fast.modes import in_evaluation, train_without
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.config import (
    Config,
    HyperOptimizerConfig,
    MethodConfig,
    OptimizerConfig,
    Precision,
    ScheduleConfig,
)
from stn_fast.training.converted import TuningMethod, response_parameters
from stn_fast.training.fit_config import FitConfig
from stn_fast.training.fit_description import (
    additions_of,
    hyperparameters_of,
    modules_of,
    name_of,
    response_of,
    settings_of,
    settings_of_loss,
    settings_of_scheduler,
)
from stn_fast.training.fit_task import Metric, check_scores, checked_metrics, loaded, task_of
from stn_fast.training.fit_words import FitProgress, in_words_of_python
from stn_fast.training.loggers import Logger, check_logger
from stn_fast.training.optimizers import MakeOptimizer, default_hyper_optimizer, learning_rate
from stn_fast.training.progress import summary
from stn_fast.training.run import run
from stn_fast.training.states import encoded
from stn_fast.training.trained import Trained, restore
from stn_fast.training.trainer import Row
from stn_fast.training.tuner import Loss, SelfTuner


class Fit:
    """What `fit` has trained.

    ``best`` and ``last`` are `Trained`: their ``model`` is the network, ``values()`` its hyperparameters, and
    ``fold()`` a plain copy of it.

    Attributes:
        result: the contents of ``result.json``.
        run_dir: the run directory.
    """

    def __init__(self, result: dict[str, Any], run_dir: Path, model: nn.Module) -> None:
        self.result, self.run_dir, self._model = result, run_dir, model

    def __repr__(self) -> str:
        return f"Fit({str(self.run_dir)!r}, valid_loss={self.result['valid_loss']:.4g})"

    @cached_property
    def best(self) -> Trained:
        """A copy of the model, at its best validation loss."""
        return restore(deepcopy(self._model), self.run_dir, "best")

    @cached_property
    def last(self) -> Trained:
        """A copy of the model, at the last step."""
        return restore(deepcopy(self._model), self.run_dir, "last")


def fit(
    model: nn.Module,
    train_loader: Iterable[Any],
    valid_loader: Iterable[Any],
    *,
    loss: Loss,
    optimizer: MakeOptimizer,
    run_dir: str | Path,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    method: TuningMethod = "stn",
    response_optimizer: MakeOptimizer | None = None,
    linearize: bool = True,
    valid_loss: Loss | None = None,
    hyper_optimizer: MakeOptimizer = default_hyper_optimizer,
    test_loader: Iterable[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    epochs: int = 20,
    train_steps: int = 2,
    warmup_epochs: int = 0,
    patience: int | None = None,
    checkpoint_epochs: int = 10,
    clip: float | None = 1.0,
    entropy_weight: float = 1e-3,
    tune_scales: bool = True,
    antithetic: bool = True,
    precision: Precision = "fp32",
    check_rows: bool = True,
    seed: int = 0,
    resume: bool = True,
    callbacks: Sequence[Callable[[Row], Any]] = (),
    loggers: Sequence[str | Logger] = (),
    quiet: bool = False,
) -> Fit:
    """Trains a converted model, tunes its hyperparameters, and writes a run directory as recipes do.

        tuned = stn.convert(model)
        fit = stn.fit(tuned, train_loader, valid_loader, loss=F.cross_entropy, run_dir="runs/mine",
                      optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0))
        plain = fit.best.fold()

    After each ``train_steps`` batches of ``train_loader``, a batch of ``valid_loader`` tunes the hyperparameters. After
    each epoch, the mean loss over all of ``valid_loader`` decides which checkpoint is the best, and rows are added to
    ``metrics.jsonl``. Steps and batches are those of `SelfTuner`, but batches are moved to the device of the model.
    Afterwards, the model itself is the best one, in evaluation mode; a later call trains it in the modes that its
    modules had before. ``python -m stn_fast.plot RUN_DIR`` draws the run.

    The same call continues a run that was stopped, bit for bit as if it had never been; if it has finished, its result
    is read, and with more epochs it goes on. Another model, space, loss, optimizer or batch size is an error that names
    what differs, and so is a metric that the result lacks. Functions are compared by their names, and losses that are
    modules by their settings, too. The data are compared if they are in a TensorDataset.

    For that, each pass over a loader and each step use torch's generators, and those given to a DataLoader, at states
    that only depend on ``seed``; these generators are left as they were. Other random numbers are not repeated: those
    of Python and NumPy in transforms (a DataLoader with workers does seed these), those of your own sampler, and an
    order that depends on which worker is faster or on what a loader remembers of earlier passes. A resumed pass reads
    again, and skips, the batches before. Each pass must have the same number of batches. Persistent workers are started
    anew in each.

    It needs what ``pip install 'stn-fast[train]'`` installs.

    Args:
        model: a converted one, as `convert` returns.
        train_loader, valid_loader, test_loader: iterables of batches that can be read again and again.
        loss: returns the mean over the examples of a batch, as for `SelfTuner`.
        optimizer: makes the optimizer of the weights from the list of the parameters.
        run_dir: the run directory.
        scheduler: makes a scheduler of `torch.optim.lr_scheduler` from the optimizer. Its ``step`` is called after each
            epoch, with the validation loss for ReduceLROnPlateau.
        method, linearize: as for `SelfTuner`.
        response_optimizer: for delta-stn, makes the optimizer of the response from the list of its parameters; by
            default, `optimizer` takes both steps. `scheduler` does not change its learning rate.
        valid_loss: what the hyperparameters minimise and evaluations report; by default `loss`.
        metrics: {name: function of outputs and targets that returns the mean over the examples of a batch}, such as
            ``{"accuracy": lambda logits, targets: (logits.argmax(1) == targets).float().mean()}``. Rows and results
            have their means over the examples of a loader as ``valid_accuracy`` and ``test_accuracy``.
        epochs: passes over ``train_loader``.
        train_steps: training steps for each validation step.
        warmup_epochs: epochs before the first validation step.
        patience: end after as many epochs in a row without a new best validation loss; None to go on.
        checkpoint_epochs: a checkpoint is written after as many epochs, at each new best and at the end.
        hyper_optimizer, clip, entropy_weight, tune_scales, antithetic, precision, check_rows: as for
            `SelfTuner`.
        seed: of all random numbers of the run; the model has its weights already.
        resume: whether to continue a run in ``run_dir``; False starts over.
        callbacks: called with each row of ``metrics.jsonl``. Rows after the last checkpoint of a stopped run are
            written again.
        loggers: names, of ``tensorboard``, ``wandb`` and ``mlflow``, or objects with the methods of
            `stn_fast.training.loggers.Logger`. They get the rows, too, and one that fails changes nothing in the run.
        quiet: whether to print only warnings.

    Raises:
        TypeError, ValueError: an argument is wrong, or does not fit the run in ``run_dir``; the message names it.
        stn_fast.training.trainer.Diverged: a loss or a gradient is not finite.
        stn_fast.training.signals.Interrupted: after SIGINT, SIGTERM or SIGUSR1; a checkpoint of the last step is
            written.
        stn_fast.training.disk.CannotWrite: the disk is full or cannot be written.
    """
    tuned = tuned_of("fit", model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError("fit: the parameters are sharded, as by fully_shard: use stn.SelfTuner in a loop of your own")
    _check(epochs, train_steps, warmup_epochs, patience, checkpoint_epochs)
    switch("fit", "resume", resume)
    if not callable(loss):
        raise TypeError(f"fit: loss must be a function of outputs and targets, got {name_of(type(loss))}")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"fit: callbacks must be a list of functions of a row, got {callbacks!r}")
    own_loggers = _own(loggers)
    scored = checked_metrics(metrics or {})
    made = _made("optimizer", optimizer, torch.optim.Optimizer, list(model.parameters()))
    settings = settings_of(made)  # a scheduler changes them
    scheduled = None if scheduler is None else _made("scheduler", scheduler, LRScheduler, made)
    of_response = None
    if response_optimizer is not None:
        parameters = response_parameters(model)
        of_response = _made("response_optimizer", response_optimizer, torch.optim.Optimizer, parameters)
    settings_of_response = {} if of_response is None else settings_of(of_response)
    tuner = SelfTuner(
        model,
        made,
        loss,
        method=method,
        response_optimizer=None if of_response is None else lambda parameters: of_response,
        linearize=linearize,
        valid_loss=valid_loss,
        hyper_optimizer=hyper_optimizer,
        entropy_weight=entropy_weight,
        tune_scales=tune_scales,
        antithetic=antithetic,
        clip=clip,
        seed=seed,
        precision=precision,
        check_rows=check_rows,
    )
    train = loaded(tuner, "fit: train_loader", train_loader)
    valid = loaded(tuner, "fit: valid_loader", valid_loader)
    test = None if test_loader is None else loaded(tuner, "fit: test_loader", test_loader)
    progress = FitProgress(epochs, switch("fit", "quiet", quiet), callbacks)
    with in_words_of_python():
        config = Config(
            recipe="fit",
            hyperparameters=hyperparameters_of(tuned.space),
            method=MethodConfig(
                name=method,
                linearize=linearize,
                train_steps=train_steps,
                warmup_epochs=warmup_epochs,
                tune_scales=tuner.method.tune_scales,
                entropy_weight=float(entropy_weight),
                antithetic=tuner.method.antithetic,
                response=response_of(tuned.space),
                response_rank=tuned.response_rank,
            ),
            optimizer=OptimizerConfig(clip=None if clip is None else float(clip)),
            hyper_optimizer=HyperOptimizerConfig(learning_rate=learning_rate(tuner.method.hyper_optimizer)),
            schedule=ScheduleConfig(
                epochs=epochs,
                patience=patience,
                batch_size=train.batch_size,
                valid_batch_size=valid.batch_size,
                checkpoint_epochs=checkpoint_epochs,
            ),
            fit=FitConfig(
                model=name_of(type(getattr(model, "_orig_mod", model))),  # what torch.compile wraps
                modules=modules_of(model),
                additions=additions_of(model),
                loss=settings_of_loss(loss),
                valid_loss=settings_of_loss(tuner.valid_loss),
                optimizer=settings,
                response_optimizer=settings_of_response,
                hyper_optimizer=settings_of(tuner.method.hyper_optimizer),
                scheduler=settings_of_scheduler(scheduled),
                train_batches=train.batches,
                valid_batches=valid.batches,
            ),
            seed=tuner.method.seed,
            device=tuned.location.device.type,  # type: ignore[arg-type]
            precision=precision,
            capture=False,
            loggers=tuple(one for one in loggers if isinstance(one, str)),
            run_dir=os.fspath(run_dir),
        )
        if model.training:
            tuned.frozen = in_evaluation(model)
        else:  # as an earlier call leaves it
            train_without(model, tuned.frozen)
        task = task_of(tuner, [train, valid, test], scored)
        result = run(
            config,
            lambda config: task,
            resume=resume,
            progress=progress,
            make_method=lambda config, task: tuner.method,
            scheduler=None if scheduled is None else _Scheduler(scheduled),
            loggers=own_loggers,
        )
        directory = Path(config.directory)
        check_scores(result, scored, test is not None, directory)
        restore(model, directory, "best")
    for line in summary(result).splitlines():
        progress.say(line)
    return Fit(result, directory, model)


def _check(epochs: int, train_steps: int, warmup_epochs: int, patience: int | None, checkpoint_epochs: int) -> None:
    for name, value, least in (
        ("epochs", epochs, 1),
        ("train_steps", train_steps, 1),
        ("warmup_epochs", warmup_epochs, 0),
        ("patience", 1 if patience is None else patience, 1),
        ("checkpoint_epochs", checkpoint_epochs, 1),
    ):
        whole_number("fit", name, value, least)


def _own(loggers: Sequence[str | Logger]) -> list[Logger]:
    """Those that are objects."""
    if isinstance(loggers, str) or not isinstance(loggers, Sequence):
        raise TypeError(f"fit: loggers must be a list of names and objects, got {loggers!r}")
    own = [one for one in loggers if not isinstance(one, str)]
    for logger in own:
        check_logger(logger)
    return own


def _made(name: str, make: Any, kind: type[Any], given: Any) -> Any:
    """``make(given)``, an object of this ``kind``."""
    if isinstance(make, kind) or not callable(make):
        raise TypeError(
            f"fit: {name} must be a function that makes it, such as partial({name_of(type(make))}, ...), because a "
            f"resumed run makes it anew; got an object of type {name_of(type(make))}"
        )
    made = make(given)
    if not isinstance(made, kind):
        raise TypeError(
            f"fit: {name} must make a {kind.__name__} of torch, but {name_of(make)} made a {name_of(type(made))}"
        )
    return made


class _Scheduler:
    """A scheduler of torch, stepped once per epoch.

    Raises:
        UserError: a checkpoint can't hold its state.
    """

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler
        try:
            encoded(scheduler.state_dict())
        except UserError as error:
            raise UserError(f"fit: scheduler, {name_of(type(scheduler))}, can't be saved: {error}") from None

    def __call__(self, loss: float) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
        else:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
