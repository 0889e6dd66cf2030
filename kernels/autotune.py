"""Picks the fastest of several ways to compute the same thing, once per problem, and remembers it.

The first time a problem is seen on a CUDA device its candidates are timed there, and the choice is kept in memory
and in a JSON file under STN_FAST_CACHE (default ~/.cache/stn_fast), so that later runs on the same machine choose
alike. The default candidate is taken, and nothing is timed, where STN_FAST_AUTOTUNE=0, on the CPU, while a CUDA
graph is being captured (a remembered choice still holds there), and under torch.use_deterministic_algorithms,
which ignores remembered choices as well: what is fastest may differ from one machine to the next, and results with
it by rounding.
"""

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from stn_fast.files import expanded

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

Candidate = Callable[[], object]
Timer = Callable[[Candidate], float]


class Refused(RuntimeError):
    """Raised by a candidate that must not be chosen here, whatever its speed."""


# A kernel that doesn't fit this device or doesn't compile for it, or one whose results don't fit its free memory.
DOES_NOT_RUN = (OutOfResources, CompilationError, PTXASError, torch.OutOfMemoryError, Refused)


def milliseconds(candidate: Candidate) -> float:
    """Median time on the device; infinite for a candidate that does not run here."""
    try:
        return triton.testing.do_bench(candidate, warmup=10, rep=40, return_mode="median")
    except DOES_NOT_RUN:
        return math.inf


def cache_file() -> Path:
    return expanded(os.environ.get("STN_FAST_CACHE") or "~/.cache/stn_fast", "STN_FAST_CACHE") / "autotune.json"


def size_bucket(size: int) -> str:
    """The next power of two, marked where a kernel can't read whole vectors."""
    return f"{triton.next_power_of_2(size)}{'' if size % 16 == 0 else 'u'}"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from changing the file meanwhile, where files can be locked."""
    if fcntl is None:
        yield
        return
    with path.with_suffix(".lock").open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks; then the last to write wins
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Autotuner:
    """Choices by key. `timer` and `path` are replaced in tests; an own timer also makes CPU problems worth timing."""

    def __init__(self, timer: Timer | None = None, path: Path | None = None) -> None:
        self._timer = timer
        self._path = path
        self._choices: dict[str, str] | None = None

    def choose(self, key: str, candidates: Mapping[str, Candidate], default: str, device: torch.device) -> str:
        """The name of the candidate to use for this problem. The default is one that runs on every device."""
        if len(candidates) == 1 or os.environ.get("STN_FAST_AUTOTUNE") == "0":
            return default
        if torch.are_deterministic_algorithms_enabled() or (device.type != "cuda" and self._timer is None):
            return default
        if device.type == "cuda":
            key = f"{torch.cuda.get_device_name(device)} {key}"
        if self._choices is None:
            self._choices = self._read()
        known = self._choices.get(key)
        if known is not None and known in candidates:
            return known
        if _capturing():
            return default
        times = {name: (self._timer or milliseconds)(candidate) for name, candidate in candidates.items()}
        if math.isinf(times[default]):
            # What always runs did not: memory is short at the moment, and these times say little about other moments.
            return default
        best = min(times, key=times.__getitem__)
        self._choices[key] = best
        self._write(key, best)
        return best

    def _file(self) -> Path:
        return self._path or cache_file()

    def _read(self) -> dict[str, str]:
        path = self._file()
        try:
            choices = json.loads(path.read_text())
            if isinstance(choices, dict) and all(isinstance(name, str) for name in choices.values()):
                return choices
            problem = "not an object of strings"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            problem = str(error)
        warnings.warn(f"{path} is ignored and will be written anew: {problem}", stacklevel=4)
        return {}

    def _write(self, key: str, name: str) -> None:
        """Adds one choice to the file; whole or not at all, for other processes read it."""
        path = self._file()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # reading it the first time has said so
                    choices = self._read() | {key: name}
                with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                    json.dump(choices, file, indent=1, sort_keys=True)
                os.replace(file.name, path)
        except OSError as error:
            warnings.warn(f"the choice of kernel is not kept in {path}: {error}", stacklevel=4)


tuner = Autotuner()
