"""A plugin for `pytest -p count_compilations`: how many kernels a GPU would have to compile for these tests.

Run with Triton's interpreter (`make count-compilations`): each launch is counted by what Triton compiles anew for, the
kernel, its constants, the dtypes of its arguments, and which of them 16 divides or are 1. With COMPILATIONS=FILE the
sum is written there under the name that PART has. Tests that need a GPU are not counted.
"""

import json
import os
from collections import Counter
from pathlib import Path

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
from triton.runtime.interpreter import InterpretedFunction

seen: Counter = Counter()
_run = InterpretedFunction.run


def _kind(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, bool) or not isinstance(value, int):
        return repr(value)
    return ("one",) if value == 1 else (value.bit_length() > 31, value % 16 == 0)


def _counted(self, *arguments, grid, warmup, **named):
    constants = {
        name for name, kind in self.fn.__annotations__.items() if "constexpr" in str(getattr(kind, "__name__", kind))
    }
    bound = {**dict(zip(self.arg_names, arguments, strict=False)), **named}
    key = tuple((name, repr(value) if name in constants else _kind(value)) for name, value in sorted(bound.items()))
    seen[(self.fn.__module__, self.fn.__name__, key)] += 1
    return _run(self, *arguments, grid=grid, warmup=warmup, **named)


InterpretedFunction.run = _counted


def pytest_terminal_summary(terminalreporter):
    kernels = Counter(name for _, name, _ in seen)
    for name, count in sorted(kernels.items()):
        terminalreporter.write_line(f"{name}: {count} compilations")
    terminalreporter.write_line(f"{sum(kernels.values())} compilations, {sum(seen.values())} launches")
    if "COMPILATIONS" in os.environ:
        file = Path(os.environ["COMPILATIONS"])
        counted = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(counted | {os.environ["PART"]: sum(kernels.values())}, indent=1) + "\n")
