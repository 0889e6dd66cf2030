"""Launches a script as two gloo processes, as torchrun does."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(script, *arguments):
    """The two processes; `{rank}` in an argument is the number of each."""
    port = free_port()
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *script, *(str(argument).format(rank=rank) for argument in arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finish(running, status=0, timeout=120):
    """What both have printed, once both have ended with this exit status."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in running]
    finally:  # if one has died, the other waits for it
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [status, status], "\n".join(said)
    return said
