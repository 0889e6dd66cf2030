"""CUDA C++ kernels: compiled by NVRTC at first use, and launched so that all of their blocks are resident at once.

Both go through cuda.bindings, which torch's CUDA builds of this platform depend on.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Compiled(NamedTuple):
    """Machine code for one kind of GPU, and the symbol of each kernel in it by its name in C++."""

    code: bytes
    symbols: dict[str, bytes]


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")


@cache
def unavailable() -> str | None:
    """Why kernels can't be compiled here; None when they can."""
    try:
        _driver()
        _nvrtc().nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: NVRTC's library is not found
        return f"{type(error).__name__}: {error}"
    return None


def _checked(returned: tuple[Any, ...], call: str) -> Any:
    """What a call of cuda.bindings returned after its status; RuntimeError where that isn't success."""
    status, *results = returned
    if status.value != 0:
        raise RuntimeError(f"{call} failed: {status.name}")
    return results[0] if results else None


def compile_kernels(source: Path, expressions: tuple[str, ...], capability: tuple[int, int]) -> Compiled:
    """Compiles the kernels that `expressions` name as C++ does; needs no device. Headers are found beside the source.

    Raises:
        RuntimeError: the code doesn't compile; the message is the compiler's.
    """
    nvrtc = _nvrtc()
    program = _checked(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []), "nvrtcCreateProgram"
    )
    try:
        for expression in expressions:
            _checked(nvrtc.nvrtcAddNameExpression(program, expression.encode()), "nvrtcAddNameExpression")
        architecture = f"--gpu-architecture=sm_{capability[0]}{capability[1]}"
        options = [architecture.encode(), b"--std=c++17", f"--include-path={source.parent}".encode()]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status.value != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{source.name} does not compile: {status.name}\n{log.decode(errors='replace')}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        symbols = {
            expression: _checked(nvrtc.nvrtcGetLoweredName(program, expression.encode()), "nvrtcGetLoweredName")
            for expression in expressions
        }
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(code, symbols)


@cache
def _context(device: int) -> Any:
    """The device's primary context, which is torch's."""
    driver = _driver()
    _checked(driver.cuInit(0), "cuInit")
    handle = _checked(driver.cuDeviceGet(device), "cuDeviceGet")
    return _checked(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")


@cache
def _function(source: Path, expression: str, shared_bytes: int, device: int) -> Any:
    """A kernel ready to launch in the device's context, which must be the current one."""
    driver = _driver()
    compiled = compile_kernels(source, (expression,), torch.cuda.get_device_capability(device))
    module = _checked(driver.cuModuleLoadData(compiled.code), "cuModuleLoadData")
    function = _checked(driver.cuModuleGetFunction(module, compiled.symbols[expression]), "cuModuleGetFunction")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(
        driver.cuFuncSetAttribute(function, attribute, shared_bytes), f"{expression}: {shared_bytes} B of shared memory"
    )
    return function


def launch(
    source: Path,
    expression: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    arguments: tuple[int, ...],
    device: torch.device,
) -> None:
    """Launches a kernel, whose arguments all have 8 bytes, cooperatively on torch's current stream.

    Raises:
        RuntimeError: it doesn't compile, or the driver refuses it: above all a grid that isn't resident all at once,
            whose blocks would wait for each other for ever.
    """
    driver, index = _driver(), device.index
    _checked(driver.cuCtxSetCurrent(_context(index)), "cuCtxSetCurrent")  # autograd's threads may have no context yet
    function = _function(source, expression, shared_bytes, index)
    words = (ctypes.c_int64 * len(arguments))(*arguments)
    first = ctypes.addressof(words)
    places = (ctypes.c_void_p * len(arguments))(*(first + 8 * position for position in range(len(arguments))))
    stream = torch.cuda.current_stream(device).cuda_stream
    launched = driver.cuLaunchCooperativeKernel(
        function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(places)
    )
    _checked(launched, f"the cooperative launch of {expression}")
