"""Runs on two machines, which are two agents of torchrun with a process each, that talk over loopback.

    python -m pytest tests/faults/test_two_nodes.py

Not among the tests of `make test`, because each launches two agents, once or twice, and so takes half a minute.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))
import gloo_runs
from run_files import result, rows
from test_shared_runs import DIES_ONCE, assert_close

# Within which all processes have ended after one has died: seconds, but that torchrun looks at them only now and then,
# and that Python may take long to start where the machine is busy.
ENDS_WITHIN = 60


def launch(folder, *arguments):
    """What each of the agents has printed, and their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    options += ["--rdzv-id=test", "--local-addr=127.0.0.1", *arguments[:-1]]
    settings = [part for setting in (*gloo_runs.DIGITS, "schedule.checkpoint_epochs=1") for part in ("--set", setting)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "stn_fast.train", arguments[-1]]
    agents = []
    try:
        for node in range(2):
            log = (folder / f"node-{node}.log").open("w")
            agents.append(
                subprocess.Popen(
                    [*command[:3], f"--node-rank={node}", *command[3:], "--run-dir", str(folder / "run"), *settings],
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    cwd=Path(__file__).parents[2],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        statuses = [agent.wait(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return statuses, [(folder / f"node-{node}.log").read_text() for node in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("one")
    gloo_runs.run_in(folder, "stn")
    return folder / "stn"


def dies(folder, times):
    """A recipe of which the second process kills itself after a few steps, `times` times."""
    recipe = folder / "dies.py"
    recipe.write_text(DIES_ONCE if times == 1 else DIES_ONCE.replace(" and not died.exists()", ""))
    return str(recipe)


def assert_equals(run, whole):
    for found, expected in zip(rows(run), rows(whole), strict=True):
        assert_close(found, expected)
    assert result(run)["processes"] == 2


def test_a_run_on_two_nodes_is_that_of_one_process(tmp_path, whole):
    statuses, said = launch(tmp_path, "digits")
    assert statuses == [0, 0], said
    assert_equals(tmp_path / "run", whole)


def test_a_process_that_dies_once_is_restarted_and_the_run_is_the_same(tmp_path, whole):
    statuses, said = launch(tmp_path, "--max-restarts=1", dies(tmp_path, times=1))
    assert statuses == [0, 0], said
    assert (tmp_path / "died").exists()
    assert "resuming" in "".join(said)
    assert_equals(tmp_path / "run", whole)


def test_a_process_that_dies_without_restarts_ends_both_nodes_and_its_error_is_shown(tmp_path):
    statuses, said = launch(tmp_path, dies(tmp_path, times=2))
    took = time.time() - (tmp_path / "died").stat().st_mtime
    assert statuses == [1, 1], said
    assert took < ENDS_WITHIN
    shown = "".join(said)
    assert "exitcode: -9" in shown  # that of the process that died
    assert "another process has ended or does not answer" in shown  # the error of the other one
    assert "Connection reset by peer" in shown or "Connection closed by peer" in shown
