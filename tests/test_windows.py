"""Every module imports where the modules, functions and signals that only POSIX has are missing."""

import subprocess
import sys

WITHOUT_POSIX = """
import os, signal, sys
import torch, numpy, matplotlib.figure, matplotlib.backends.backend_agg, sklearn.datasets, tqdm, yaml, pathlib
for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "curses"):
    sys.modules[name] = None
for name in ("fork", "geteuid", "getuid", "sched_getaffinity", "sysconf", "mkfifo", "uname", "killpg", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGKILL", "SIGALRM", "SIGQUIT", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
import importlib, pkgutil, stn_fast
names = [module.name for module in pkgutil.walk_packages(stn_fast.__path__, "stn_fast.")]
assert len(names) > 60, names
for name in names:
    if not name.startswith("stn_fast.kernels") and name != "stn_fast._C":
        importlib.import_module(name)
from stn_fast import train
sys.exit(train.main(["digits", "--max-steps", "2", "--run-dir", sys.argv[1]]))
"""


def test_every_module_imports_and_a_run_ends_well_without_what_only_posix_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, str(tmp_path / "run")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "schedule.png").exists()
