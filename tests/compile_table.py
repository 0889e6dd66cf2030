"""Prints what every shipped kernel uses, compiled ahead of time; exit status 1 if one of them may not ship.

python tests/compile_table.py [--triton FOLDER] [--only WORD ...] [--hashes FILE]
"""

import argparse
import json
import os
import sys
from pathlib import Path

from compile_ahead import Usage, compile_all, problems

COLUMNS = "{:<86} {:>4} {:>9} {:>7} {:>7} {:>5} {:>6} {:>5}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", type=Path, help="folder with the Triton to use (default: the installed one)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only labels that contain all words")
    parser.add_argument(
        "--hashes", type=Path, metavar="FILE", help="write the hash of each one's instructions, as JSON"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    arguments = parser.parse_args()
    # Here, because new processes read this module before they choose their Triton.
    from shipped_kernels import JOBS

    jobs = [job for job in JOBS.values() if all(word in job.label for word in arguments.only)]
    print(
        COLUMNS.format("configuration", "sm", "registers", "shared", "spilled", "stack", "wgmma", "C75xx", "problems")
    )
    rejected = 0
    hashes = {}
    for job, usage in zip(jobs, compile_all(jobs, arguments.processes, arguments.triton), strict=True):
        found = problems(job, usage)
        rejected += bool(found)
        numbers = ["-"] * 6
        if isinstance(usage, Usage):
            hashes[job.label] = usage.hash
            numbers = [usage.registers, usage.shared, usage.local, usage.stack, usage.wgmma, len(usage.messages)]
        label = f"{job.kernel.split(':')[1].removesuffix('_kernel')} {job.label}"
        print(COLUMNS.format(label, job.capability, *numbers, "; ".join(found)).rstrip())
    print(f"{len(jobs)} configurations, {rejected} rejected")
    if arguments.hashes:
        arguments.hashes.write_text(json.dumps(hashes, indent=1) + "\n")
    return int(rejected > 0)


if __name__ == "__main__":
    sys.exit(main())
