"""A run of 5,000 steps takes no more time and memory at its end than after its beginning."""

import os
import time
from pathlib import Path
from statistics import median

import pytest
from short_run import short

from stn_fast.recipes import digits
from stn_fast.training.run import run
from stn_fast.training.trainer import Trainer

STEPS = 5000
# On a busy machine, the ratios were 1.04 and 0.96, and the memory grew by 0.5 MB and by nothing.
SLOWER, BYTES = 1.2, 8e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs the memory in /proc")
@pytest.mark.parametrize("method", ["stn", "delta-stn"])
def test_time_and_memory_of_5000_steps_are_flat(tmp_path, monkeypatch, method):
    advance, seconds, memory = Trainer._advance, [], []

    def timed(trainer):
        began = time.thread_time()  # not what other programs take
        advance(trainer)
        seconds.append(time.thread_time() - began)
        if trainer.step % 100 == 0:
            memory.append(os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1]))

    monkeypatch.setattr(Trainer, "_advance", timed)
    pairs = ("schedule.epochs=1000", f"schedule.max_steps={STEPS}", f"method.name={method}")
    run(short(tmp_path / "run", *pairs), digits.build)
    assert len(seconds) == STEPS
    slower = typical(seconds[-1000:]) / typical(seconds[1000:2000])
    grown = median(memory[-10:]) - median(memory[10:20])
    print(f"{method}: time of a step x {slower:.3f}, memory + {grown / 1e6:.2f} MB")
    assert slower < SLOWER
    assert grown < BYTES


def typical(seconds):
    """A step that other programs have disturbed little: only a tenth of the steps are faster."""
    return sorted(seconds)[len(seconds) // 10]
