"""One run from a configuration to a result: set up or resume, train, evaluate the best checkpoint, write the result."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import stn_fast
from stn_fast.data import fingerprint
from stn_fast.dispatch import chosen
from stn_fast.errors import UserError
from stn_fast.extras import require
from stn_fast.files import exists
from stn_fast.ops.openmp import full_team
from stn_fast.training import checkpoint
from stn_fast.training.build import build_method
from stn_fast.training.config import FLAGS, Config, ConfigError
from stn_fast.training.distributed import Processes, first_of, in_first
from stn_fast.training.finite import is_writable
from stn_fast.training.loggers import Logger, Loggers, check_logger, named_loggers
from stn_fast.training.methods import Method
from stn_fast.training.metrics import MetricsLog, NoLog, size_of
from stn_fast.training.parameters import check_used
from stn_fast.training.progress import Progress
from stn_fast.training.run_directory import RunDirectory
from stn_fast.training.states import encoded
from stn_fast.training.task import Task
from stn_fast.training.trainer import Row, Scheduler, Trainer
from stn_fast.values import finite


def run(
    config: Config,
    build_task: Callable[[Config], Task],
    *,
    resume: bool = True,
    progress: Progress | None = None,
    make_method: Callable[[Config, Task], Method] = build_method,
    scheduler: Scheduler | None = None,
    processes: Processes | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Trains as ``config`` says, in ``config.directory``, and returns the contents of ``result.json``.

    ``make_method`` may return a `Method` of your own; by default it is the one that ``config.method`` names.
    ``scheduler`` may change the learning rate of its optimizer after every epoch; its state is saved. ``processes``
    share each batch and evaluation; all call this, need the same disk, and get the result, and the first one writes.
    ``loggers``, and those that ``config.loggers`` names, are told the rows of ``metrics.jsonl``; they change nothing.

    With ``resume``, a run in that directory continues from its newest undamaged checkpoint, bit for bit as if it had
    never stopped; if it is finished, its result is returned. Both need the data that the run was trained on, though
    they may have moved.

    Raises:
        UserError: the configuration, the data or the run directory cannot be used.
        CannotWrite: the disk is full or cannot be written; the same command continues from the last checkpoint.
        Diverged, Interrupted: as ``Trainer.fit``.
    """
    config, progress = config.resolved, progress or Progress(quiet=True)
    for logger in loggers:
        check_logger(logger)
    tracking = Loggers([*named_loggers(config.loggers), *loggers] if first_of(processes) else (), progress.warn)
    require("safetensors")  # not to miss it when the first checkpoint is written
    with ExitStack() as stack:
        stack.enter_context(using_threads(config.threads))

        def begin() -> Task:
            directory = RunDirectory(config.directory)
            stack.enter_context(directory.locked())
            checkpoint.recover(directory.checkpoints)
            if resume and directory.resumable:
                directory.check_same_run(config)
            elif resume:
                directory.check_free()
                if exists(directory.result):
                    directory.check_finished(config)
                elif exists(directory.metrics):  # there may be many rows before the first checkpoint is complete
                    progress.warn(f"{directory.path} holds a run without a checkpoint: starting over from step 0")
            return checked_task(config, build_task)  # which may download the data

        task = in_first(processes, begin) or checked_task(config, build_task)
        directory, data = RunDirectory(config.directory, write=False), fingerprint(task.data, task.vocabulary)
        resumes = resume and directory.resumable
        if resumes or (resume and exists(directory.result)):
            directory.check_same_data(data, progress.warn)
            if (result := directory.finished_result(config)) is not None:
                progress.say(f"{directory.path} is finished; --no-resume would run it again")
                return result
        method = make_method(config, task)
        if method.accumulation != (parts := config.schedule.accumulation):
            raise ConfigError("schedule.accumulation", parts, f"must be that of make_method's, {method.accumulation}")
        if processes is not None:
            _check_shares(config, processes)
            method.share(processes)
        return _train(config, method, task, data, directory, resumes, progress, scheduler, tracking)


def _check_shares(config: Config, processes: Processes) -> None:
    """Raises UserError if a batch has fewer examples than there are processes, times parts of each share."""
    parts = config.schedule.accumulation
    least, named = processes.size * parts, "the number of processes" + ("" if parts == 1 else f" times {parts} parts")
    for key in ("batch_size", "valid_batch_size"):
        if (size := getattr(config.schedule, key)) < least:
            raise ConfigError(f"schedule.{key}", size, f"must be at least {least}, {named}")


def _train(
    config: Config,
    method: Method,
    task: Task,
    data: dict[str, str],
    directory: RunDirectory,
    resume: bool,
    progress: Progress,
    scheduler: Scheduler | None,
    loggers: Loggers,
) -> dict[str, Any]:
    processes = method.processes

    def report(row: Row) -> None:
        progress.row(row)
        loggers.row(row)

    trainer = Trainer(config, task, method, directory.checkpoints, report, progress.step, progress.warn, scheduler)
    progress.say(_about(config, task, trainer))
    if resume:
        _continue(trainer, directory, progress)
    else:
        encoded(method.state_dict())  # not to miss what a checkpoint can't hold when the first one is written

    def prepare() -> None:
        if not resume:
            directory.clear()
        directory.write_config(config)
        directory.write_data(data)
        directory.clear_result()

    in_first(processes, prepare)
    progress.start = trainer.train_steps / trainer.train_batches.per_pass
    log = MetricsLog(directory.metrics, trainer.rows) if first_of(processes) else NoLog(trainer.rows)
    with loggers.started(config, directory.path, directory.metrics, trainer.rows):
        with progress, log:
            trainer.fit(log)
        result = finite(best_result(trainer, task, progress))
        in_first(processes, lambda: directory.write_result(result))
        loggers.result(result)
    return result


def _about(config: Config, task: Task, trainer: Trainer) -> str:
    """One line about the run: recipe, data, size, precision, and the reason if it uses a slow backend."""
    backend, reason = chosen(torch.device(config.device))
    kinds = zip(("training", "validation", "test"), task.data, strict=True)
    sizes = [f"{task.batching.count(split):,} {kind}" for kind, split in kinds if split is not None]
    parameters = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    steps = trainer.train_batches.per_pass
    return (
        f"{config.recipe}, {config.method.label}: {', '.join(sizes)} {task.batching.unit}; "
        f"{parameters:,} trained parameters; {steps:,} training steps an epoch"
        + ("" if trainer.process_count == 1 else f"; {trainer.process_count} processes share each batch")
        + ("" if config.schedule.accumulation == 1 else f"; each batch in {config.schedule.accumulation} parts")
        + ("" if config.precision == "fp32" else f"; matrix products in {config.precision}")
        + ("" if reason is None else f"; using the slow backend {backend!r}: {reason}")
    )


def _continue(trainer: Trainer, directory: RunDirectory, progress: Progress) -> None:
    """Loads the newest undamaged checkpoint in ``directory`` into ``trainer``."""
    newest = checkpoint.read_newest(directory.checkpoints, trainer.config.device, progress.warn)
    if newest is None:
        return
    path, state = newest
    with checkpoint.fitting(path):
        trainer.load_state_dict(state)
    size_of(directory.metrics, trainer.rows)  # raises before anything in the directory is changed
    if (key := trainer.overrun) is not None:
        section, _, name = key.partition(".")
        value, flag = getattr(getattr(trainer.config, section), name), FLAGS.get(key, f"--set {key}=...")
        raise UserError(
            f"{directory.path} is already at step {trainer.step}, epoch {trainer.epoch}, but {key} = {value} ends it "
            f"earlier: change this with {flag}, or choose another --run-dir"
        )
    progress.say(f"resuming {directory.path} after step {trainer.step}")
    if (before := state["processes"]) != trainer.process_count:
        progress.warn(
            f"the checkpoint is of {before} processes and is continued by {trainer.process_count}: sums over the "
            "examples are rounded otherwise, and a text goes on from a zero state, so the run is not bit for bit what "
            "it would have been"
        )
    trainer.check_best(progress.warn)


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Inside, torch and the C++ core use ``count`` CPU threads; None keeps the current number.

    If OpenMP would start fewer threads, they use one: torch's own layers might compute wrong numbers otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    if not full_team():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checked_task(config: Config, build_task: Callable[[Config], Task]) -> Task:
    """Builds the task, and checks its device, its batch sizes and a first forward pass."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "needs a CUDA device and a CUDA build of torch; use cpu")
    try:
        task = build_task(config)
        for key, split in (("batch_size", task.data.train), ("valid_batch_size", task.data.valid)):
            size = getattr(config.schedule, key)
            if (wrong := task.batching.misfit(split, size)) is not None:
                raise ConfigError(f"schedule.{key}", size, wrong)
        _rehearse(task, config.schedule.batch_size)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    return task


@torch.no_grad()
def _rehearse(task: Task, batch_size: int) -> None:
    """One forward pass, in which layers raise errors about unsuitable hyperparameters or batches.

    It uses two examples, the fewest that batch norm accepts, and restores the running statistics afterwards.
    """
    device = next(task.model.parameters()).device
    first = task.batching.sequence(task.data.train, min(2, batch_size), seed=0, stream=0, device=device)[0]
    location, _ = task.space.initial_state(device)
    kept = [(buffer, buffer.clone()) for buffer in task.model.buffers() if is_writable(buffer)]
    hyper = task.space.at(location, batch_size=first.examples)
    try:
        task.training_objective(task.model, first, hyper)
        if not task.allow_unused:
            check_used(hyper, task.model, all_by_name=True)
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def best_result(trainer: Trainer, task: Task, progress: Progress) -> dict[str, Any]:
    """The result: scores and hyperparameters of the best checkpoint, read back from the disk."""
    config, steps, epochs = trainer.config, trainer.step, trainer.epoch
    last_location = trainer.method.location.detach().clone()
    trainer.check_best(progress.warn)
    trainer.restore_best()
    space, location = trainer.method.space, trainer.method.location.detach()
    start, raw_scale = space.initial_state(location.device)
    scales = space.scales(raw_scale)
    scores = trainer.all_scores()
    return {
        "recipe": config.recipe,
        "method": config.method.label,
        "seed": config.seed,
        "steps": steps,
        "valid_steps": trainer.valid_steps,
        "epochs": epochs,
        "ended_by": trainer.ended_by,
        "best_step": trainer.best["step"],
        **trainer.compute,
        "steps_per_second": round(steps / max(trainer.step_clock.seconds, 1e-9), 2),
        "peak_bytes": peak_bytes(config.device),
        "processes": trainer.process_count,
        "precision": config.precision,
        "captured": captured(trainer),
        **task.facts,
        **scores,
        "hyperparameters": space.values(location),
        "hyperparameters_start": space.values(start),
        "hyperparameters_end": space.values(last_location),
        "moved_in_initial_scales": dict(zip(space.names, ((location - start) / scales).tolist(), strict=True)),
        "versions": versions(config.device),
    }


def captured(trainer: Trainer) -> dict[str, Any] | None:
    """How many steps of this process were replays of a CUDA graph, and why others were not; None without capture.

    No reason is given for the first steps of each kind, which precede the capture, and the first window of a pass.
    """
    steps = trainer.captured
    return None if steps is None else {"steps": steps.replayed, "reasons": steps.reasons}


def peak_bytes(device: str) -> int | None:
    """Peak memory: on CUDA what torch allocated, otherwise the process's memory on the host.

    None on Windows, where Python has no call for it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not POSIX
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def versions(device: str) -> dict[str, str | int]:
    """The versions, device, threads and backend that a result was computed with."""
    return {
        "stn_fast": stn_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "backend": chosen(torch.device(device))[0],
    }
