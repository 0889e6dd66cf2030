"""A tiny run on a disk on which a call fails, for tests/training/test_disk_faults.py and tests/faults/test_disk.py."""

import shutil
from dataclasses import replace

import pytest
from failing_disk import ERRORS, FailingDisk
from run_files import result, rows

from stn_fast.errors import UserError
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.disk import CannotWrite
from stn_fast.training.layering import resolve
from stn_fast.training.run import run

# Two epochs of one training step, with a validation step after each, and three checkpoints.
PAIRS = (
    *("schedule.epochs=2", "method.warmup_epochs=0", "method.train_steps=1", "train_fraction=0.12"),
    *("schedule.checkpoint_epochs=1", "schedule.eval_batch_size=500"),
)


def tiny(directory):
    run(replace(resolve(digits.config(), None, PAIRS), run_dir=str(directory)), digits.build)
    return directory


def calls_of(folder):
    """The calls of a run that nothing disturbed, in runs/tiny below the folder; of several writes to a file, two."""
    folder.mkdir(exist_ok=True)
    disk = FailingDisk(folder)
    with disk.patched():
        tiny(folder / "runs" / "tiny")
    last = {call[:2]: call[2] for call in disk.calls}
    return [call for call in disk.calls if call[2] in (0, last[call[:2]])]


def check_fault(call, error, whole, folder):
    """The call fails with the error: it is told, the checkpoint before is whole, and the same command continues."""
    directory = folder / "runs" / "tiny"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    disk = FailingDisk(folder, call, error)
    with disk.patched(), pytest.raises((CannotWrite, UserError)) as told:
        tiny(directory)
    assert disk.failed
    said = str(told.value)
    assert ERRORS[error] in said, (call, said)
    assert str(named(folder, call)) in said, (call, said)
    if done := checkpoint.steps(directory / "checkpoints"):
        path, _ = checkpoint.read_newest(directory / "checkpoints", "cpu", pytest.fail)
        assert path == checkpoint.path_of(directory / "checkpoints", done[-1])
    if "step-" in call[1] and "step-00000000" not in call[1]:
        assert done, call
    tiny(directory)
    assert rows(directory) == rows(whole), call
    assert result(directory) == result(whole), call
    assert not [path for path in directory.rglob("*") if path.name.endswith((".partial", ".replaced"))], call


def named(folder, call):
    """The path that the error about a call has to name: that of the file or checkpoint, not of a part of it."""
    path = folder / call[1]
    if path.name.startswith(".lock"):
        return path
    if path.parent.name.endswith(".partial"):
        path = path.parent
    name = path.name.removesuffix(".partial").strip(".")
    return path.with_name(name)
