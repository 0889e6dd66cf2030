"""One of two processes that train digits; in one of them, a signal arrives in a phase, or the disk is full.

    python gloo_signals.py FOLDER PHASE SIGNAL

Without a phase ("none"), or if it has happened before, the run is left alone. FOLDER/signalled then has the time. In
the phase "disk", the first process can't write the second checkpoint.
"""

import errno
import os
import signal
import sys
import time
from pathlib import Path

from gloo_runs import DIGITS

from stn_fast import train
from stn_fast.training import checkpoint
from stn_fast.training.disk import writing
from stn_fast.training.methods import SelfTuning
from stn_fast.training.trainer import Trainer

# Two epochs of 12 training steps, the first a warm-up; steps that are evaluated and saved: 0, 12, 30.
SETTINGS = (*DIGITS, "schedule.epochs=2", "method.warmup_epochs=1", "schedule.checkpoint_epochs=1")
# What is called in each phase, at which of its calls the signal arrives, and in which process.
PHASES = {
    "warm-up": (SelfTuning, "train_step", 3, 1),
    "training": (SelfTuning, "train_step", 17, 1),
    "validation": (SelfTuning, "valid_step", 2, 1),
    "evaluation": (Trainer, "evaluate", 4, 1),  # the test examples after the first epoch
    "checkpoint": (checkpoint, "write_encoded", 2, 0),  # only the first process writes
}


def signal_in(phase, number, signalled):
    owner, name, at, _ = PHASES[phase]
    function, calls = getattr(owner, name), []

    def call(*given, **options):
        calls.append(1)
        if len(calls) == at:
            signalled.write_text(str(time.time()))
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return function(*given, **options)

    setattr(owner, name, call)


def fill_the_disk(signalled):
    write = checkpoint.write_encoded

    def full(root, step, *given):
        if step:
            signalled.touch()
            with writing(checkpoint.path_of(root, step)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(root, step, *given)

    checkpoint.write_encoded = full


if __name__ == "__main__":
    folder, phase, name = Path(sys.argv[1]), *sys.argv[2:]
    signalled = folder / "signalled"
    if phase == "disk":
        if not signalled.exists() and os.environ["RANK"] == "0":
            fill_the_disk(signalled)
    elif phase != "none" and not signalled.exists() and os.environ["RANK"] == str(PHASES[phase][3]):
        signal_in(phase, getattr(signal, name), signalled)
    pairs = [part for pair in SETTINGS for part in ("--set", pair)]
    raise SystemExit(train.main(["digits", "--run-dir", str(folder / "run"), *pairs]))
