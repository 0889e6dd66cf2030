"""SIGTERM to torchrun itself ends a run with a checkpoint, also where it may start processes again."""

import os
import re
import signal
import subprocess
import sys
import time

from stn_fast.training import checkpoint


def test_sigterm_to_torchrun_ends_the_run_with_a_checkpoint(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["-m", "stn_fast.train", "digits", "--run-dir", str(run), "--epochs", "5000", "--set", "threads=1"]
    with log.open("w") as said:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
        while process.poll() is None and checkpoint.steps(run / "checkpoints")[-1:] in ([], [0]):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", log.read_text())
    assert stopped, log.read_text()
    assert status == 1  # torchrun's own
    assert checkpoint.steps(run / "checkpoints")[-1] == int(stopped[1])
    assert "resuming" not in log.read_text()
    assert not (run / "result.json").exists()
