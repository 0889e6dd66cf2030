"""A few kills of a short run, and that the comparison of tests/faults/kills.py notices differences."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch

from stn_fast.training import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_runs_survive_kills_and_end_as_if_there_had_been_none():
    command = [sys.executable, "tests/faults/kills.py", "--recipes", "digits", "--kills", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digits (stn, delta-stn): 3 kills survived" in done.stdout


def test_a_difference_of_one_bit_or_row_is_found(whole, tmp_path):
    expected = kills.final(whole)
    assert not kills.differences(expected, kills.final(whole))
    assert {place.partition("/")[2].partition("/")[0] for place in expected if place.startswith("last/")} > {
        *("method", "train_steps", "train_loss", "plateau", "best")
    }
    other = shutil.copytree(whole, tmp_path / "other")
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace('"epoch": 3', '"epoch": 2'))
    assert kills.differences(expected, kills.final(other)) == ["metrics"]
    root = other / "checkpoints"
    state = checkpoint.read(checkpoint.path_of(root, checkpoint.steps(root)[-1]))
    moments = state["method"]["optimizer"]["state"][0]["momentum_buffer"]
    moments.view(torch.int32).flatten()[7] ^= 1
    state["wall_seconds"] += 1
    checkpoint.write(
        root, checkpoint.steps(root)[-1], state, json.loads((other / "result.json").read_text())["best_step"]
    )
    found = kills.differences(expected, kills.final(other))
    assert "last/method/optimizer/state/0/momentum_buffer" in found
    assert not [place for place in found if "momentum_buffer" not in place and place != "metrics"]
