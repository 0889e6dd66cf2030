"""How CUDA C++ kernels are compiled and launched: the calls of the driver, recorded, and NVRTC itself where it is."""

import ctypes
import sys
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from cuda_compiler import require_compiler

from stn_fast.kernels import cooperative
from stn_fast.kernels.gated_lstm_persistent import SOURCE

DEVICE = torch.device("cuda", 1)


class Status(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720


class Driver:
    """cuda.bindings.driver as far as a launch needs it; `status` is that of the launch."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self):
        self.calls, self.status, self.words = [], Status.CUDA_SUCCESS, []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return Status.CUDA_SUCCESS, f"<{name}>"

        return call

    def cuLaunchCooperativeKernel(self, *arguments):
        self.calls.append(("cuLaunchCooperativeKernel", *arguments[:-1]))
        places = ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_void_p))
        self.words = [ctypes.c_int64.from_address(places[i]).value for i in range(3)]
        return (self.status,)


@pytest.fixture
def driver(monkeypatch):
    recorded = Driver()
    monkeypatch.setattr(cooperative, "_driver", lambda: recorded)
    monkeypatch.setattr(
        cooperative,
        "compile_kernels",
        lambda _, names, capability: cooperative.Compiled(b"code", {names[0]: b"symbol"}),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=77))
    for cached in (cooperative._context, cooperative._function):
        cached.cache_clear()
    yield recorded
    for cached in (cooperative._context, cooperative._function):
        cached.cache_clear()


def launch():
    cooperative.launch(SOURCE, "kernel<1>", 12, 256, 100_000, (2**40 + 8, 0, -5), DEVICE)


def test_a_launch_is_cooperative_on_torchs_stream_in_the_devices_context(driver):
    """An ordinary launch of a grid that isn't resident as a whole would hang; a thread of autograd has no context."""
    launch()
    launch()
    assert driver.calls[-2:] == [
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>"),
        ("cuLaunchCooperativeKernel", "<cuModuleGetFunction>", 12, 1, 1, 256, 1, 1, 100_000, 77),
    ]
    assert driver.words == [2**40 + 8, 0, -5]
    assert driver.calls.index(("cuDeviceGet", 1)) < driver.calls.index(
        ("cuCtxSetCurrent", "<cuDevicePrimaryCtxRetain>")
    )
    once = [
        call for call in driver.calls if call[0] in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
    ]
    assert once == [
        ("cuModuleLoadData", b"code"),
        ("cuModuleGetFunction", "<cuModuleLoadData>", b"symbol"),
        ("cuFuncSetAttribute", "<cuModuleGetFunction>", "shared", 100_000),
    ]


def test_a_grid_that_is_not_resident_is_an_error_with_the_drivers_words(driver):
    driver.status = Status.CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
    with pytest.raises(RuntimeError, match=r"launch of kernel<1> failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"):
        launch()


def test_no_release_of_cuda_core_is_needed(monkeypatch):
    """They name cooperative launches differently; 1.0 doesn't import beside torch 2.11's cuda.bindings."""
    require_compiler()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    cooperative.unavailable.cache_clear()
    assert cooperative.unavailable() is None
    name = "stn_fast::gated_lstm_backward<stn_fast::Shape<8, 1, 1, 1>>"
    compiled = cooperative.compile_kernels(SOURCE, (name,), (9, 0))
    assert compiled.code.startswith(b"\x7fELF")
    assert compiled.symbols[name].startswith(b"_Z")


def test_a_mistake_in_the_code_is_shown_with_the_compilers_words(tmp_path):
    require_compiler()
    source = tmp_path / "broken.cu"
    source.write_text("int broken(;\n")
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile(.|\n)*error"):
        cooperative.compile_kernels(source, ("broken",), (9, 0))


@pytest.mark.parametrize("missing", ["cuda.bindings.driver", "cuda.bindings.nvrtc"])
def test_without_the_compiler_tests_are_skipped_only_where_there_is_no_gpu(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    cooperative.unavailable.cache_clear()
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(pytest.skip.Exception, match=missing):
            require_compiler()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(pytest.fail.Exception, match=missing):
            require_compiler()
    finally:
        cooperative.unavailable.cache_clear()
