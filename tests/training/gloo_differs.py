"""One of two processes that should hold the same numbers; the second changes one of them by one unit in the last place.

    python gloo_differs.py FOLDER

Prints the errors of two runs of a recipe, which change λ, and of a `SelfTuner`, which changes a weight.
"""

import gc
import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gloo_process
import torch
import torch.nn.functional as F

import stn_fast as stn
from stn_fast.recipes import digits
from stn_fast.training import passes, trainer
from stn_fast.training.build import build_method
from stn_fast.training.distributed import ProcessesDiffer, launched
from stn_fast.training.layering import resolve
from stn_fast.training.run import run

EVERY = 10  # steps, so that there need not be many
SETTINGS = ("schedule.batch_size=8", "schedule.valid_batch_size=8", "method.warmup_epochs=0", "threads=1")


@torch.no_grad()
def nudge(number):
    number.copy_(torch.nextafter(number, torch.full_like(number, math.inf)))


def run_that_differs(folder, processes, after, *more):
    """A run in which λ of one process changes before step number `after`."""
    made = []

    def make_method(config, task):
        made.append(build_method(config, task))
        return made[0]

    @contextmanager
    def around_step(step):
        if step == after and processes.rank == 1:
            nudge(made[0].location[2])
        yield

    config = resolve(digits.config(), pairs=[*SETTINGS, *more], flags={"run_dir": str(folder)})
    task = lambda config: replace(digits.build(config), around_step=around_step)  # noqa: E731
    run(config, task, make_method=make_method, processes=processes)


def tune(processes):
    """Steps of a `SelfTuner`, after one of which a weight of one process changes."""
    tuned = gloo_process.network()
    optimizer = torch.optim.SGD(tuned.parameters(), 0.01)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, process_group=processes.group)
    for step in range(EVERY // 2):
        tuner.step(*(gloo_process.share(tensors, processes.rank, 2) for tensors in gloo_process.batch(step)))
        if step == 0:
            tuner.check_equal()
        if step == 2 and processes.rank == 1:
            nudge(tuned[0].weight[1, 1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with launched("cpu") as processes:
        for every, call in (
            (EVERY, lambda: run_that_differs(folder / "step", processes, 4)),
            (1000, lambda: run_that_differs(folder / "checkpoint", processes, 4, "schedule.max_steps=8")),
            (EVERY, lambda: tune(processes)),
        ):
            trainer.CHECK_EVERY = passes.CHECK_EVERY = every
            try:
                call()
            except ProcessesDiffer as error:
                print(error)
        gc.collect()  # a group that is still held when Python ends has threads that abort it
