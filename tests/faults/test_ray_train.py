"""Two workers of a local Ray, of which one is killed, compute the run of two processes bit for bit."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from libraries import library
from run_files import result, rows

from stn_fast.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 40


def killed_once(process, directory):
    """What the process prints. The second worker is killed once the run in the directory has a checkpoint."""
    said, second = "", None
    for line in process.stdout:
        said += line
        if second is None and (found := re.search(r"pid=(\d+)\) world_rank=1,", line)):
            second = int(found[1])
        if second and checkpoint.steps(directory / "checkpoints"):
            os.kill(second, signal.SIGKILL)
            second = 0  # not again
    assert second == 0, said
    return said


def test_ray_starts_both_workers_again_after_one_has_died_and_the_run_is_the_same(tmp_path):
    library("ray")
    shared = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launch, "stn_fast.train", "digits", "--run-dir", str(tmp_path / "whole"), "--epochs", str(EPOCHS)]
    subprocess.run([*command, "--set", "threads=1"], cwd=ROOT, env=shared, check=True, timeout=300, capture_output=True)

    command = [sys.executable, "examples/ray_train.py", "--epochs", str(EPOCHS), "--folder", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = shared | {
        "PYTHONPATH": paths,
        "PYTHONUNBUFFERED": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        late = threading.Timer(400, process.kill)
        late.start()
        try:
            said = killed_once(process, tmp_path / "run")
        finally:
            late.cancel()
    assert process.returncode == 0, said
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert (
        f"'test_accuracy': {result(tmp_path / 'whole')['test_accuracy']}"
        in said.split("Checkpoint successfully created")[-1]
    )
    assert list(tmp_path.glob("ray/*/checkpoint_*/result.json"))
