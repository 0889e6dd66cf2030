"""Picks the fastest of several ways to compute the same thing, once per problem, and remembers it.

Where a choice comes from, the first that there is:

1. what this machine has found out before: the first time that a problem is seen on a CUDA device its candidates are
   timed there, and the choice is kept in memory and in a JSON file under STN_FAST_CACHE (default ~/.cache/stn_fast). A
   choice holds for the device's name, the releases of Triton and torch, and the sources of the kernels;
2. timing them now. Nothing is timed where STN_FAST_AUTOTUNE=0, on the CPU, and while a CUDA graph is being captured;
3. the table that the package ships for devices of this name, kernels/tuned/NAME.json, at the nearest problem: the same
   operation, dtype and alignment of all sizes, and the smallest sum over sizes of |log2| of their ratio;
4. the default.

Under torch.use_deterministic_algorithms it is always the default: what is fastest may differ from one machine to the
next, and results with it by rounding.

    python -m stn_fast.kernels.autotune --export kernels/tuned

writes the table of this machine's device from what it has found out.
"""

import argparse
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from stn_fast.files import cache_root, locked, replace

Timer = Callable[[Callable[[], object]], float]


class Refused(RuntimeError):
    """Raised by a candidate that must not be chosen here, whatever its speed."""


# A kernel that doesn't fit this device or doesn't compile for it, or one whose results don't fit its free memory.
DOES_NOT_RUN = (OutOfResources, CompilationError, PTXASError, torch.OutOfMemoryError, Refused)
# The same, where nothing but the message of a bare RuntimeError says so: Triton's passes, the driver when it loads or
# launches a kernel, and libraries that find no memory for their workspace. All else, such as an illegal memory access,
# is an error of ours that must be seen.
SAYS_IT_DOES_NOT_RUN = re.compile(
    r"PassManager::run failed|failed to translate module to LLVM IR"
    r"|Triton Error \[CUDA\]: (out of memory|too many resources requested for launch|invalid device function"
    r"|no kernel image is available|device kernel image is invalid|a PTX JIT compilation failed"
    r"|too many blocks in cooperative launch)"
    r"|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
TABLES = Path(__file__).with_name("tuned")
TABLE_FORMAT = 1
MOST_KNOWN = 4096  # choices by sizes that are kept: texts of all lengths have as many


class Problem(NamedTuple):
    """What a choice is for: `operation`, all that must be equal for two problems to be alike, and sizes."""

    operation: tuple[object, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """Its name in files. Problems whose sizes share buckets share a choice."""
        return f"{' '.join(map(str, self.operation))} | {' '.join(map(size_bucket, self.sizes))}"


def does_not_run(error: Exception) -> bool:
    """Whether this is about the device and a candidate, not a mistake in the kernel or the call."""
    bare = type(error) is RuntimeError and SAYS_IT_DOES_NOT_RUN.search(str(error)) is not None
    return isinstance(error, DOES_NOT_RUN) or bare


def milliseconds(candidate: Callable[[], object]) -> float:
    """Median time on the device; infinite for a candidate that does not run here."""
    try:
        return triton.testing.do_bench(candidate, warmup=10, rep=40, return_mode="median")
    except Exception as error:
        if does_not_run(error):
            return math.inf
        raise


def cache_file() -> Path:
    return cache_root() / "autotune.json"


def size_bucket(size: int) -> str:
    """The next power of two, marked where a kernel can't read whole vectors."""
    return f"{triton.next_power_of_2(size)}{'' if size % 16 == 0 else 'u'}"


@cache
def versions() -> str:
    """The releases and the kernels that a measurement holds for."""
    return f"triton {triton.__version__} torch {torch.__version__} kernels {kernels_version(Path(__file__).parent)}"


def kernels_version(folder: Path) -> str:
    """Changes with every change of the kernels' sources."""
    digest = hashlib.sha256()
    for source in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".h")):
        digest.update(f"{source.relative_to(folder).as_posix()}\0".encode() + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def environment(device_name: str) -> str:
    """What the names of problems begin with in the cache."""
    return f"{device_name} {versions()} | "


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def table_file(device_name: str) -> Path:
    """Where the package ships the choices for devices of this name."""
    return TABLES / f"{re.sub(r'[^0-9A-Za-z]+', '_', device_name).strip('_')}.json"


def _choices(content: object) -> dict[str, str]:
    if isinstance(content, dict) and all(isinstance(name, str) for name in content.values()):
        return content
    raise ValueError("not an object of strings")


@cache
def shipped(device_name: str) -> dict[str, str]:
    """The shipped choices by problem; none where there is no table, or, after a warning, where it can't be read."""
    path = table_file(device_name)
    try:
        table = json.loads(path.read_text())
        if not isinstance(table, dict) or table.get("format") != TABLE_FORMAT:
            raise ValueError(f"not a table of format {TABLE_FORMAT}")
        return _choices(table.get("choices"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"the table of tuned kernels {path} is ignored: {error}", stacklevel=4)
        return {}


def nearest(problem: str, table: dict[str, str], names: Collection[str]) -> str | None:
    """The choice of the table for the nearest problem, among those that are in `names`; see the module."""
    operation, _, sizes = problem.rpartition(" | ")
    best, least = None, math.inf
    for other, name in sorted(table.items()):
        other_operation, _, other_sizes = other.rpartition(" | ")
        if other_operation == operation and name in names:
            far = _distance(sizes.split(), other_sizes.split())
            if far < least:
                best, least = name, far
    return best


def _distance(sizes: list[str], others: list[str]) -> float:
    """Σ |log2 of a size's ratio to the other|; infinite for other alignments or another number of sizes."""
    if len(sizes) != len(others) or any(a.endswith("u") != b.endswith("u") for a, b in zip(sizes, others, strict=True)):
        return math.inf
    return sum(abs(math.log2(int(a.rstrip("u")) / int(b.rstrip("u")))) for a, b in zip(sizes, others, strict=True))


_Key = tuple[Problem | str, torch.device]


def _keep(known: dict[_Key, str], key: _Key, name: str) -> str:
    """Keeps a choice, forgetting all others where there are too many, and returns it."""
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[key] = name
    return name


class Autotuner:
    """Choices by problem. `timer` and `path` are for tests; with a timer of its own, CPU problems are timed too."""

    def __init__(self, timer: Timer | None = None, path: Path | None = None) -> None:
        self._timer = timer
        self._path = path
        self._remembered: dict[str, str] | None = None
        # By the sizes themselves, so that no names are made on the way to a kernel.
        self._own: dict[_Key, str] = {}
        self._guessed: dict[_Key, str] = {}

    def choose(
        self,
        problem: Problem | str,
        names: Collection[str],
        run: Callable[[str], object],
        default: str,
        device: torch.device,
    ) -> str:
        """The name of the candidate to use for this problem, out of `names`; `run` runs the candidate of a name.

        Called where `device` is the current one. The default is a candidate that runs on every device. Whatever `run`
        leaves behind, of a candidate that failed say, is not a result: the caller runs the chosen one again.
        """
        if len(names) == 1 or torch.are_deterministic_algorithms_enabled():
            return default
        key = problem, device
        known = self._own.get(key)
        if known is not None and known in names:
            return known
        if device.type != "cuda" and self._timer is None:
            return default
        may_time = os.environ.get("STN_FAST_AUTOTUNE") != "0" and not capturing()
        guess = self._guessed.get(key)
        if guess is not None and guess in names and not may_time:
            return guess
        if self._remembered is None:
            self._remembered = self._read()
        text = f"{environment(_device_name(device))}{problem}"
        known = self._remembered.get(text)
        if known is not None and known in names:
            return _keep(self._own, key, known)
        if not may_time:
            guess = nearest(str(problem), shipped(_device_name(device)), names) or default
            return _keep(self._guessed, key, guess)
        times = {name: (self._timer or milliseconds)(partial(run, name)) for name in names}
        if math.isinf(times[default]):
            # What always runs did not: memory is short at the moment, and these times say little about other moments.
            return default
        best = min(times, key=times.__getitem__)
        self._remembered[text] = best
        self._write(text, best)
        return _keep(self._own, key, best)

    def _file(self) -> Path:
        return self._path or cache_file()

    def _read(self) -> dict[str, str]:
        path = self._file()
        try:
            return _choices(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is ignored and will be written anew: {error}", stacklevel=4)
            return {}

    def _write(self, key: str, name: str) -> None:
        """Adds one choice to the file; whole or not at all, for other processes read it."""
        path = self._file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # reading it the first time has said so
                    choices = self._read() | {key: name}
                replace(path, _as_file(choices))
        except OSError as error:
            warnings.warn(f"the choice of kernel is not kept in {path}: {error}", stacklevel=4)


def _as_file(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


tuner = Autotuner()


def export(path: Path, device_name: str | None = None, tuned: Autotuner = tuner) -> Path:
    """Writes the table of what this machine has found out, as `shipped` reads it, and returns where it is.

    Args:
        path: of the table; in a folder its name is the one that it has in kernels/tuned.
        device_name: of the CUDA device; default: the current one.
        tuned: whose file of remembered choices is read.

    Raises:
        ValueError: nothing is remembered for this device with the installed releases and these kernels.
    """
    name = device_name or torch.cuda.get_device_name()
    known, prefix = tuned._read(), environment(name)
    choices = {key.removeprefix(prefix): choice for key, choice in known.items() if key.startswith(prefix)}
    if not choices:
        raise ValueError(f"{tuned._file()} has no choice for {name!r} with {versions()}: run something on it first")
    path = path / table_file(name).name if path.is_dir() else path
    table = {"format": TABLE_FORMAT, "device": name, "versions": versions(), "choices": choices}
    replace(path, _as_file(table))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table and prints where it is; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m stn_fast.kernels.autotune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--export", type=Path, metavar="PATH", required=True, help="write the table here: a file or folder"
    )
    parser.add_argument("--device", metavar="NAME", help="of the CUDA device; default: the one that is there")
    options = parser.parse_args(arguments)
    if options.device is None and not torch.cuda.is_available():
        parser.error("there is no CUDA device: name the one that was tuned with --device")
    try:
        print(export(options.export, options.device))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
