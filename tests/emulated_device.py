"""Runs the kernels of kernels/cuda on the host, threads, blocks and barriers included: see emulation/device.h."""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from stn_fast.kernels import gated_lstm_persistent as persistent
from stn_fast.kernels.gated_lstm_persistent import SOURCE, Limits, Plan

HERE = Path(__file__).parent / "emulation"


@cache
def built(expression: str, sources: Path) -> ctypes.CDLL:
    """The kernel compiled for the host. The folder of the emulation comes first, so that its device.h is found."""
    with TemporaryDirectory(prefix="stn_fast_emulation_") as folder:
        library = Path(folder, "kernel.so")
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"]
        command += [f"-I{HERE}", f"-I{sources}", f"-DKERNEL=({expression})"]
        subprocess.run([*command, str(HERE / "launch.cpp"), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.emulate.restype = ctypes.c_char_p
    loaded.emulate.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_uint)
    return loaded


class EmulatedDevice:
    """A device of so many multiprocessors. `order` is that in which blocks and warps run: 0 is the natural one."""

    def __init__(self, multiprocessors: int, shared_bytes: int, sources: Path = SOURCE.parent) -> None:
        self.limits = Limits(multiprocessors, shared_bytes)
        self.sources = sources
        self.order = 0
        self.launched: list[tuple[str, Plan]] = []

    def take_the_place_of_cuda(self, monkeypatch) -> None:
        """From here on the host functions of the kernels launch on this device."""
        monkeypatch.setattr(persistent, "_limits", lambda _: self.limits)
        monkeypatch.setattr(persistent, "_launch", self._launch)

    def _launch(self, expression: str, plan: Plan, arguments: tuple[int, ...], _: object) -> None:
        self.launched.append((expression, plan))
        words = (ctypes.c_longlong * len(arguments))(*arguments)
        emulate = built(expression, self.sources).emulate
        failure = emulate(words, len(arguments), plan.blocks, plan.shared_bytes, self.order)
        assert failure is None, f"{expression}: {failure.decode()}"
