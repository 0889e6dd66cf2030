"""Runs every script of a folder, from the root of the repository: ``python tests/run_cases.py DIR``.

One line for each script, with its exit status and the seconds it took, then a count. The exit status is 1 if any script
failed, 2 if there is none. Scripts whose names begin with ``_`` are left out: others import them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 1800.0  # seconds for one script


def outcome(script: Path, timeout: float) -> str:
    """The exit status of ``script`` as text; "timeout" where it took too long and was ended."""
    try:
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return str(done.returncode)


def main(arguments: Sequence[str], timeout: float = TIMEOUT) -> int:
    """Runs the scripts and prints their outcomes; returns the exit status."""
    sys.stdout.reconfigure(errors="backslashreplace")
    if len(arguments) != 1 or not arguments[0]:
        print("error: name one folder of scripts: make cases CASES=DIR", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).expanduser().resolve()
    scripts = [script for script in sorted(folder.glob("*.py")) if not script.name.startswith("_")]
    if not scripts:
        print(f"error: there is no script *.py in {folder}", file=sys.stderr)
        return 2
    failed = 0
    for script in scripts:
        began = time.monotonic()
        status = outcome(script, timeout)
        failed += status != "0"
        print(f"exit status {status:>7}  {time.monotonic() - began:7.1f} s  {script.name}", flush=True)
    print(f"{failed} of {len(scripts)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
