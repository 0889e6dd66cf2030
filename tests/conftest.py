"""What every test shares: Triton's interpreter where there is no GPU, poisoned outputs, and the 2x rule."""

import os

import pytest
import torch

# Read when triton is imported, so it must be set before any kernel module is.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


def _poisoning(allocate):
    def poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not out.is_floating_point() or type(out) is not torch.Tensor:
            return out
        return out.fill_(float("nan"))

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh memory holds NaN, so an element that no kernel wrote shows."""
    monkeypatch.setattr(torch, "empty", _poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoning(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference; a NaN or a wrong shape counts as infinite."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    error = (got.detach().double().cpu() - want.detach().double().cpu()).norm()
    error = error / want.detach().double().cpu().norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def assert_twice_as_good(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """The 2x rule: at most twice the error of plain torch in the same dtype, both against float64."""
    assert relative_error(kernel, exact) <= 2 * relative_error(plain, exact) + 1e-6
