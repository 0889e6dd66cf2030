"""The training loop: cycles of training and validation steps, epochs, evaluation, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from stn_fast.data import Split
from stn_fast.errors import UserError
from stn_fast.hyperparameters import HyperBatch
from stn_fast.modes import evaluating
from stn_fast.training import checkpoint
from stn_fast.training.averaging import averaged_model
from stn_fast.training.batches import as_batch
from stn_fast.training.capture import CapturedSteps
from stn_fast.training.config import Config
from stn_fast.training.distributed import CHECK_EVERY, ProcessesDiffer, Shares, in_first, load_share, part_of
from stn_fast.training.finite import NonFiniteError
from stn_fast.training.methods import Method, SelfTuning
from stn_fast.training.metrics import MeanLoss, MetricsLog, NoLog, describe
from stn_fast.training.optimizers import captures
from stn_fast.training.plateau import Plateau
from stn_fast.training.precision import float32_products
from stn_fast.training.saving import FAILED, Saving
from stn_fast.training.signals import Interrupted, StopRequest
from stn_fast.training.step_clock import StepClock
from stn_fast.training.task import Task

Row = dict[str, Any]


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite; ``compute`` is that of the run until then, as `Trainer.compute`."""

    def __init__(self, message: str, compute: Row) -> None:
        super().__init__(message)
        self.compute = compute


class Scheduler(Protocol):
    """Called at the end of each epoch with its validation loss; changes the learning rate of the weights."""

    def __call__(self, loss: float, /) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Runs ``method`` on ``task`` as ``config`` says, and writes rows of metrics and checkpoints.

    Everything that the next step depends on is in ``state_dict``: the method's state, the counts of steps, and the
    states that batches carry. Batch orders and random draws are functions of the seed and the counts.

    Args:
        config, task, method: what to run.
        checkpoints: the directory that holds ``step-XXXXXXXX/``.
        report: called with every row as it is written.
        on_step: called after every step with the number of passes over the training set, as a fraction.
        warn: called with the reason if steps cannot be captured as CUDA graphs, and with the error of a checkpoint
            if another error ends the run.
        scheduler: of the learning rate, besides ``config.optimizer``.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        method: Method,
        checkpoints: Path,
        report: Callable[[Row], None] = lambda row: None,
        on_step: Callable[[float], None] = lambda passes: None,
        warn: Callable[[str], None] = lambda reason: None,
        scheduler: Scheduler | None = None,
    ) -> None:
        schedule = config.schedule
        self.config, self.task, self.method, self.checkpoints = config, task, method, checkpoints
        self.report, self.on_step, self.scheduler = report, on_step, scheduler
        train, valid, _ = task.data
        device = method.location.device
        sequence, seed = task.batching.sequence, config.seed
        self.processes = method.processes
        self.train_batches = sequence(train, schedule.batch_size, seed=seed, stream=0, device=device)
        self.valid_batches = sequence(valid, schedule.valid_batch_size, seed=seed, stream=1, device=device)
        if self.processes is not None:
            self.train_batches = Shares(self.train_batches, self.processes, device)
            self.valid_batches = Shares(self.valid_batches, self.processes, device)
        captured = config.capture and captures(device) and self.processes is None
        self.captured = CapturedSteps(method, warn=warn) if captured else None
        self._steps = self.captured or method
        average = config.optimizer.average
        self.averaged = averaged_model(method.model, average) if average else None
        self.train_steps = self.valid_steps = 0
        self.train_loss, self.response_loss, self.valid_loss = (MeanLoss(device) for _ in range(3))
        self.best: Row = {"valid_loss": math.inf, "step": 0}
        self.plateau = Plateau(config.optimizer, schedule.patience)
        self.rows, self.reported_at = 0, 0.0
        self._saving = Saving(warn)
        self.step_clock = StepClock(beside=lambda: self._saving.cpu_seconds)
        self.wall_seconds, self.cpu_seconds = 0.0, 0.0
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._saved_at = -1

    @property
    def process_count(self) -> int:
        """How many processes share each batch: 1 for a process by itself."""
        return 1 if self.processes is None else self.processes.size

    @property
    def step(self) -> int:
        """Number of training and validation steps so far; with the seed, it fixes the next step's random draws."""
        return self.train_steps + self.valid_steps

    @property
    def examples(self) -> dict[str, int]:
        """Training and validation examples (words of a text) that steps have read so far, once for each pass.

        A training step of ``method.training_passes`` passes counts its batch as often; evaluations are not counted.
        """
        train = self.method.training_passes * self.train_batches.examples_of(self.train_steps)
        return {"train_examples": train, "valid_examples": self.valid_batches.examples_of(self.valid_steps)}

    @property
    def compute(self) -> Row:
        """Seconds on the clock and of CPU time (of all threads) up to the end or the last checkpoint, and `examples`.

        Both times include evaluations and checkpoints, of earlier processes too, but not the loading of data;
        ``step_cpu_seconds`` is the CPU time of training and validation steps only.
        """
        times = {
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "step_cpu_seconds": self.step_clock.cpu_seconds,
        }
        return {**{name: round(seconds, 3) for name, seconds in times.items()}, **self.examples}

    @property
    def epoch(self) -> int:
        """Number of passes over the training set, including the current one."""
        return -(-self.train_steps // self.train_batches.per_pass)

    @property
    def finished(self) -> bool:
        """Whether the run has reached the end of its schedule, or the validation losses have ended it."""
        schedule = self.config.schedule
        enough_epochs = self.train_steps >= schedule.epochs * self.train_batches.per_pass and self._cycle_closed
        return self.step >= (schedule.max_steps or math.inf) or enough_epochs or self.plateau.stop is not None

    @property
    def ended_by(self) -> str:
        """The key of the configuration that ended a finished run."""
        if self.plateau.stop is not None:
            return self.plateau.stop.key
        schedule = self.config.schedule
        return "schedule.max_steps" if self.step >= (schedule.max_steps or math.inf) else "schedule.epochs"

    @property
    def overrun(self) -> str | None:
        """The key of the configuration that would have ended the run before now, if there is one."""
        schedule, stop = self.config.schedule, self.plateau.stop
        if self.step > (schedule.max_steps or math.inf):
            return "schedule.max_steps"
        if self.train_steps > schedule.epochs * self.train_batches.per_pass:
            return "schedule.epochs"
        return stop.key if stop is not None and self.epoch > stop.epoch else None

    @property
    def _cycle_closed(self) -> bool:
        """Whether all validation steps that are due after the training steps so far have been done."""
        if not self.method.tunes:
            return True
        cycle = self.config.method
        since_warmup = self.train_steps - cycle.warmup_epochs * self.train_batches.per_pass
        return self.valid_steps >= max(0, since_warmup) // cycle.train_steps * cycle.valid_steps

    @property
    def _epoch_closed(self) -> bool:
        return self.train_steps % self.train_batches.per_pass == 0 and self._cycle_closed

    def fit(self, log: MetricsLog | NoLog) -> None:
        """Trains from the current state to the end of the schedule.

        Raises:
            Diverged: a loss or a gradient is not finite; no checkpoint holds that state.
            Interrupted: SIGINT, SIGTERM or SIGUSR1 was received; a checkpoint of the last completed step is written.
            ProcessesDiffer: processes that share the batches hold different numbers; no checkpoint holds them.
            CannotWrite: the disk is full or cannot be written; earlier checkpoints are intact.
        """
        self._started = time.perf_counter() - self.wall_seconds
        self._cpu_started = time.process_time() - self.cpu_seconds
        self.step_clock.resume()
        with StopRequest() as stop, self._saving:
            if self.rows == 0:
                self._close_epoch(log)
            while not self.finished:
                self._advance()
                self.on_step(self.train_steps / self.train_batches.per_pass)
                if self._epoch_closed:
                    self._close_epoch(log)
                if (number := self._stopped_by(stop)) is not None:
                    self._save(log)
                    self._finish_saving()
                    raise Interrupted(number, self.step)
            # An unfinished epoch is saved before its early report, so that a longer run can continue from it as if it
            # had never stopped.
            self._save(log)
            if not self._epoch_closed:
                self._report_epoch(log)
            self._finish_saving()
        self._note_times()

    def _stopped_by(self, stop: StopRequest) -> int | None:
        """The signal that this process has received, or any of those that share the batches.

        Raises the error of the last checkpoint if it could not be written.
        """
        number = FAILED if self._saving.failed else stop.number or 0
        if self.processes is not None:
            number = self.processes.most(number)
        if number == FAILED:
            self._finish_saving()
        return number or None

    def _finish_saving(self) -> None:
        """Returns once the last checkpoint is on the disk; raises the error if it could not be written."""
        in_first(self.processes, self._saving.wait)

    def _advance(self) -> None:
        try:
            with self.task.around_step(self.step):
                self._take_step()
        except NonFiniteError as error:
            self._diverge(error.reason)
        if self.step % CHECK_EVERY == 0:
            self._check_equal()

    def _check_equal(self) -> None:
        try:
            self.method.check_equal(self.step)
        except ProcessesDiffer as error:
            raise ProcessesDiffer(f"{error}. The last good checkpoint is {self._last_checkpoint()}") from error

    def _take_step(self) -> None:
        if self._cycle_closed:
            batch, first = self.train_batches[self.train_steps], self._first_example(self.config.schedule.batch_size)
            self.train_loss.add(self._steps.train_step(batch, self.step, first_example=first))
            if self.method.response_loss is not None:
                self.response_loss.add(self.method.response_loss)
            if self.averaged is not None:
                self.averaged.update_parameters(self.method.model)
            self.train_steps += 1
        else:
            batch, size = self.valid_batches[self.valid_steps], self.config.schedule.valid_batch_size
            self.valid_loss.add(self._steps.valid_step(batch, self.step, first_example=self._first_example(size)))
            self.valid_steps += 1

    def _first_example(self, batch_size: int) -> int:
        """The place of this process's first example in a batch."""
        return 0 if self.processes is None else self.processes.share(batch_size).start

    def _close_epoch(self, log: MetricsLog | NoLog) -> None:
        lower = self.plateau.add(self._report_epoch(log))
        if lower is not None:
            self.method.learning_rate = lower
        if self.scheduler is not None and self.train_steps:
            self.scheduler(self.plateau.losses[-1])
        self._rescale()
        is_best = self.best["step"] == self.step
        if is_best or self.epoch % self.config.schedule.checkpoint_epochs == 0:
            self._save(log)

    def _rescale(self) -> None:
        """Sets the scales of the next epoch, if they decay."""
        decay = self.config.method.scale_decay
        if decay != 1 and isinstance(self.method, SelfTuning):
            past = self.train_steps / (self.config.schedule.epochs * self.train_batches.per_pass)
            self.method.rescale(decay ** min(past, 1.0))

    def _report_epoch(self, log: MetricsLog | NoLog) -> float:
        """Writes the epoch's rows and updates the best; returns the validation loss."""
        try:
            self.method.check_finite()
        except NonFiniteError as error:
            self._diverge(error.reason)
        tuned = describe(self.method.space, self.method.location, self.method.scales())
        self.step_clock.pause()
        trained = {"learning_rate": self.method.learning_rate}
        if self.response_loss.steps:
            trained["response_loss"], _ = self.response_loss.take()
        for phase, losses, batches, extra in (
            ("train", self.train_loss, self.train_batches, trained),
            ("valid", self.valid_loss, self.valid_batches, tuned),
        ):
            if losses.steps:
                loss, steps = losses.take()
                self._write(log, phase, loss, steps * batches.examples, self.reported_at, extra)
        began = self._seconds()
        scores = self.all_scores()
        loss = scores.pop("valid_loss")
        examples = sum(split.examples for split in self.task.data[1:] if split is not None)
        stepped = {"step_cpu_seconds": round(self.step_clock.cpu_seconds, 3), **self.examples}
        evaluated = {"loss_unit": self.task.loss_unit, **stepped, **scores, **tuned}
        self._write(log, "eval", loss, examples, began, evaluated)
        if loss < self.best["valid_loss"]:
            self.best = {"valid_loss": loss, "step": self.step}
        self.reported_at = self._seconds()
        self.step_clock.resume()
        return loss

    def _write(self, log: MetricsLog | NoLog, phase: str, loss: float, examples: int, since: float, extra: Row) -> None:
        if not math.isfinite(loss):
            self._diverge(f"the {phase} loss became {loss} by step {self.step}")
        now = self._seconds()
        row = {"step": self.step, "epoch": self.epoch, "phase": phase, "wall_seconds": round(now, 3), "loss": loss}
        row["cpu_seconds"] = round(self._cpu_seconds(), 3)
        row["examples_per_second"] = round(examples / max(now - since, 1e-9), 1)
        row |= extra
        log.write(row)
        self.rows = log.rows
        self.report(row)

    def _diverge(self, what: str) -> NoReturn:
        self.step_clock.pause()
        self._note_times()
        values = self.method.space.values(self.method.location)
        named = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        rates = [f"optimizer.learning_rate (now {self.method.learning_rate:g})"]
        if self.method.tunes:
            rates.append(f"hyper_optimizer.learning_rate (now {self.config.hyper_optimizer.learning_rate})")
        if not all(math.isfinite(value) for value in values.values()):
            rates.reverse()  # the hyperparameters diverged, so name their learning rate first
        raise Diverged(
            f"{what} (epoch {self.epoch}), hyperparameters then: {named}; "
            f"lower {' or '.join(rates)}, with --no-resume or in another --run-dir. "
            f"The last good checkpoint is {self._last_checkpoint()}",
            self.compute,
        )

    def _last_checkpoint(self) -> Path | str:
        self._saving.settle()
        found = checkpoint.steps(self.checkpoints)
        return self._path(found[-1]) if found else "none: nothing was saved yet"

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _cpu_seconds(self) -> float:
        return time.process_time() - self._cpu_started

    def _note_times(self) -> None:
        self.wall_seconds, self.cpu_seconds = self._seconds(), self._cpu_seconds()

    def all_scores(self) -> dict[str, float]:
        """The scores of the validation examples, and of the test examples if there are any: ``valid_loss`` etc."""
        data = self.task.data
        scores = {"valid": self.evaluate(data.valid)}
        if data.test is not None:
            scores["test"] = self.evaluate(data.test)
        return {f"{split}_{name}": value for split, found in scores.items() for name, value in found.items()}

    @torch.no_grad()
    def evaluate(self, split: Split, unperturbed: Callable[[int], HyperBatch] | None = None) -> dict[str, float]:
        """Scores of all of ``split`` at the unperturbed hyperparameters, on folded weights, in float32.

        The weights are those of ``evaluated``. ``unperturbed`` makes other hyperparameters for a number of examples; by
        default the method's own does.
        """
        sums: dict[str, torch.Tensor] = {}
        for scores in self.scores(split, unperturbed):
            for name, value in scores.items():
                sums[name] = sums.get(name, 0) + value.double()
        totals = {name: total.item() for name, total in sums.items()}
        if self.processes is not None:
            shares = self.processes.gathered(totals)
            names = dict.fromkeys(name for share in shares for name in share)
            totals = {name: sum(share.get(name, 0.0) for share in shares) for name in names}
        return self.task.report({name: total / split.examples for name, total in totals.items()})

    def scores(
        self, split: Split, unperturbed: Callable[[int], HyperBatch] | None = None
    ) -> Iterator[dict[str, torch.Tensor]]:
        """What ``evaluate`` adds up: the scores of each of its batches, sums over this process's examples of it.

        Gradients reach the hyperparameters if these require them, but not through the state that a text carries from
        one batch to the next.
        """
        size, device, model = self.config.schedule.eval_batch_size, self.method.location.device, self.evaluated
        unperturbed = unperturbed or self.method.unperturbed
        with evaluating(model), float32_products("fp32"):
            for given in self.task.batching.whole(split, size, test=split is self.task.data.test, device=device):
                batch = as_batch(given, device) if self.processes is None else part_of(given, self.processes, device)
                if not batch.examples:  # fewer than processes
                    continue
                yield batch.finish(self.task.scores(model, batch, unperturbed(batch.examples)))

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network that evaluations use: the averaged one if there is one, and else the method's."""
        return self.method.model if self.averaged is None else self.averaged.module

    def _save(self, log: MetricsLog | NoLog) -> None:
        if self._saved_at == self.step:
            return
        for phase, losses in (("train", self.train_loss), ("valid", self.valid_loss)):
            if not math.isfinite(total := losses.total.item()):
                self._diverge(f"the {phase} loss became {total} by step {self.step}")
        learnt = (*self.method.model.parameters(), self.method.location)
        if not all(torch.isfinite(tensor).all() for tensor in learnt):
            self._diverge(f"weights or hyperparameters are not finite after step {self.step}")
        self.step_clock.pause()
        self._check_equal()
        log.sync()
        self._note_times()
        state = self.state_dict()

        kept = self.config.schedule.checkpoints_kept
        write = partial(checkpoint.write_encoded, self.checkpoints, self.step, self.best["step"], kept)
        in_first(self.processes, lambda: self._saving.begin(state, write))
        self._saved_at = self.step
        self.step_clock.resume()

    def check_best(self, warn: Callable[[str], None]) -> None:
        """If the best checkpoint cannot be read, replaces it by the best of the others, and calls ``warn``.

        Raises:
            UserError: no checkpoint can be read.
        """
        found = [step for step in checkpoint.steps(self.checkpoints) if step <= self.step]
        device = self.method.location.device
        try:
            checkpoint.read(self._path(self.best["step"]), device)
            return
        except checkpoint.DamagedCheckpoint as error:
            damage = str(error)
        here = copy.deepcopy(self._learnt())
        others: list[Row] = []
        for step in found:
            try:
                state = checkpoint.read(self._path(step), device)
            except checkpoint.DamagedCheckpoint:
                continue
            with checkpoint.fitting(self._path(step)):
                self._load_learnt(state)
            others.append({"valid_loss": self.evaluate(self.task.data.valid)["loss"], "step": step})
        self._load_learnt(here)
        if not others:
            raise UserError(
                f"every checkpoint under {self.checkpoints} is damaged, the best one: {damage}; "
                "restore one from a copy, or start over with --no-resume"
            )
        lost, self.best = self.best, min(others, key=lambda other: other["valid_loss"])
        warn(
            f"the best checkpoint (validation loss {lost['valid_loss']:.4f}) is lost: {damage}; the best of the others "
            f"is {self._path(self.best['step'])} (validation loss {self.best['valid_loss']:.4f})"
        )

    def _path(self, step: int) -> Path:
        return checkpoint.path_of(self.checkpoints, step)

    def restore_best(self) -> None:
        """Restores the weights and hyperparameters with the lowest validation loss.

        Raises:
            DamagedCheckpoint: their checkpoint cannot be read.
        """
        self._load_learnt(checkpoint.read(self._path(self.best["step"]), self.method.location.device))

    def _learnt(self) -> Row:
        """The part of ``state_dict`` that evaluations depend on."""
        averaged = None if self.averaged is None else self.averaged.state_dict()
        return {"method": self.method.state_dict(), "averaged": averaged}

    def _load_learnt(self, state: Row) -> None:
        self.method.load_state_dict(state["method"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    def state_dict(self) -> Row:
        """Everything that the next step and the next row depend on; of several processes, all must call this."""
        return {
            **self._learnt(),
            "train_steps": self.train_steps,
            "valid_steps": self.valid_steps,
            "train_batches": self.train_batches.state_dict(),
            "valid_batches": self.valid_batches.state_dict(),
            "train_loss": self.train_loss.state_dict(),
            "response_loss": self.response_loss.state_dict(),
            "valid_loss": self.valid_loss.state_dict(),
            "best": self.best,
            "plateau": self.plateau.state_dict(),
            "rows": self.rows,
            "wall_seconds": self.wall_seconds,
            "cpu_seconds": self.cpu_seconds,
            "reported_at": self.reported_at,
            "step_clock": self.step_clock.state_dict(),
            "processes": self.process_count,
            **({} if self.scheduler is None else {"scheduler": self.scheduler.state_dict()}),
        }

    def load_state_dict(self, state: Row) -> None:
        """Restores what ``state_dict`` returned."""
        self._load_learnt(state)
        for name in ("train_batches", "valid_batches"):
            load_share(getattr(self, name), state[name], self.processes)
        self.train_loss.load_state_dict(state["train_loss"])
        self.response_loss.load_state_dict(state["response_loss"])
        self.valid_loss.load_state_dict(state["valid_loss"])
        self.plateau.load_state_dict(state["plateau"])
        self.step_clock.load_state_dict(state["step_clock"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name in ("train_steps", "valid_steps", "best", "rows", "reported_at"):
            setattr(self, name, state[name])
        self.wall_seconds, self.cpu_seconds = state["wall_seconds"], state["cpu_seconds"]
        self._saved_at = self.step
