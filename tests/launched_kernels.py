"""Compiles every variant of a kernel that steps of the recipes launch, for real GPUs, on a machine without one.

    python tests/launched_kernels.py [RECIPE...] [--triton FOLDER]

The variants are those of `benchmarks.launches`, which runs in a process of its own: Triton must not interpret there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from compile_ahead import Job, compile_all, problems

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (80, 90)


def jobs(recipes: Iterable[str] = (), capabilities: Iterable[int] = CAPABILITIES) -> list[Job]:
    """One job for every variant, of all recipes where none is named; with all candidates of the autotuner."""
    command = [sys.executable, "-m", "benchmarks.launches", *recipes, "--variants", *map(str, capabilities)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    printed = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return [_job(number, variant) for number, variant in enumerate(json.loads(printed))]


def _job(number: int, variant: dict) -> Job:
    types, divisible = variant["types"], frozenset(variant["divisible"])
    unaligned = [name for name, kind in types.items() if kind.startswith("*") and name not in divisible]
    if unaligned:
        raise ValueError(f"{variant['kernel']} is given pointers that are not multiples of 16 bytes: {unaligned}")
    label = f"{variant['kernel'].split(':')[1]}-sm{variant['capability']}-{number}"
    how = (variant["num_warps"], variant["num_stages"], divisible)
    return Job(variant["kernel"], label, variant["capability"], types, variant["constants"], *how)


def main() -> int:
    """Compiles and prints; returns how many may not ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--triton", type=Path, help="folder with the Triton to use (default: the installed one)")
    arguments = parser.parse_args()
    wrong = 0
    every = jobs(arguments.recipes)
    for job, usage in zip(every, compile_all(every, triton_folder=arguments.triton), strict=True):
        found = problems(job, usage)
        if found or isinstance(usage, str):
            wrong += 1
            print(f"{job.label}: WRONG {'; '.join(found)}\n    {job}")
        else:
            print(
                f"{job.label}: {usage.registers} registers, {usage.shared} B shared, {usage.tensor_cores or 'scalar'}"
            )
    print(f"{len(every)} variants, {wrong} wrong")
    return min(wrong, 255)


if __name__ == "__main__":
    raise SystemExit(main())
