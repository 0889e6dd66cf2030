"""What every test shares: Triton's interpreter where there is no GPU, every backend, and poisoned outputs."""

import os
from importlib.util import find_spec

import pytest
import quick_interpreter
import torch

# Read when triton is imported, so it must be set before any kernel module is.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    quick_interpreter.install()

# float32 is float32 in every test but those of TF32. The older settings first: torch reads them no more where only the
# newer ones are changed.
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False
for _of_one in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
    _of_one.fp32_precision = "ieee"


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not out.is_floating_point() or type(out) is not torch.Tensor:
            return out
        out.detach().fill_(float("nan"))
        return out

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh memory holds NaN, so an element that no kernel wrote shows."""
    monkeypatch.setattr(torch, "empty", _poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))


def pytest_collection_modifyitems(config, items):
    """Deselects the cases of a test of every backend and dtype whose backend doesn't compute the dtype."""
    from stn_fast.ops.serving import ELEMENTWISE, GATED

    def unserved(item):
        params = getattr(item, "callspec", None) and item.callspec.params
        if not params or not {"backend", "dtype"} <= set(params):
            return False
        takes = ELEMENTWISE if item.path.stem in ("test_dropout", "test_noise") else GATED
        return params["dtype"] not in takes.get(params["backend"], (params["dtype"],))

    for item in items:
        if _computes_on_cuda(item):
            item.add_marker("cuda")
    unserved_items = [item for item in items if unserved(item)]
    items[:] = [item for item in items if not unserved(item)]
    config.hook.pytest_deselected(items=unserved_items)


# Under tests/kernels: what needs no device, or is made for machines without one.
_WITHOUT_DEVICE = ("test_autotune", "test_compile_ahead", "test_compile_ahead_cuda", "test_gated_lstm_persistent")


def _computes_on_cuda(item):
    """Whether a test computes on the CUDA device where there is one: what `make test-gpu` runs, and nothing else."""
    if item.get_closest_marker("gpu"):
        return True
    params = getattr(item, "callspec", None) and item.callspec.params
    if params and (params.get("device") == "cuda" or params.get("backend") == "triton"):
        return True
    return item.path.parent.name == "kernels" and item.path.stem not in _WITHOUT_DEVICE


@pytest.fixture(params=sorted({"cpu", DEVICE}))
def device(request):
    """Runs the test on every device, each operation on the backend that it chooses by itself."""
    return request.param


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request):
    """Runs the test on every backend; Triton is interpreted where there is no GPU. Yields the device to use."""
    from stn_fast.dispatch import use_backend

    with use_backend(request.param):
        yield DEVICE if request.param == "triton" else "cpu"
