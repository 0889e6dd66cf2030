"""A trainer in the state of a run's checkpoint, to evaluate and not to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stn_fast.data import fingerprint
from stn_fast.errors import UserError
from stn_fast.training import checkpoint
from stn_fast.training.build import build_method
from stn_fast.training.config import Config
from stn_fast.training.run import checked_task
from stn_fast.training.run_directory import RunDirectory
from stn_fast.training.task import Task
from stn_fast.training.trained import saved_state
from stn_fast.training.trainer import Trainer


def restored(
    path: Path, config: Config, build_task: Callable[[Config], Task], warn: Callable[[str], None], *, best: bool = False
) -> Trainer:
    """A trainer in the state of the run in ``path``, which is only read and may be running.

    Args:
        config: the run's configuration. Its device, threads and data root may be others than those of the run.
        build_task: builds the task of the run's recipe.
        warn: called with the reason if a checkpoint is damaged, or the data cannot be checked.
        best: whether to take the checkpoint with the lowest validation loss, instead of the newest.

    Raises:
        UserError: the run has no response or no checkpoint, a file is damaged, or the data are not those of the run.
    """
    if not config.method.has_response:
        raise UserError(
            f"{path} holds a run of --method {config.method.name}, whose weights don't respond to hyperparameters: "
            "name one of stn or delta-stn"
        )
    directory = RunDirectory(path, write=False)
    config = replace(config, precision="fp32", capture=False)  # evaluations are in fp32 and not captured
    task = checked_task(config, build_task)
    if changed := directory.changed_data(fingerprint(task.data, task.vocabulary), warn):
        raise UserError(
            f"{path} holds a run on other data (different: {', '.join(changed)}): name the run's data with --data-root"
        )
    place, state = saved_state(path, "best" if best else "last", config.device, warn)
    trainer = Trainer(config, task, build_method(config, task), directory.checkpoints)
    with checkpoint.fitting(place):
        trainer.load_state_dict(state)
    return trainer
