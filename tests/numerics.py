"""How close is close enough: relative errors and the 2x rule."""

from math import isfinite

import torch


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference; a NaN or a wrong shape counts as infinite."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    error = (got.detach().double().cpu() - want.detach().double().cpu()).norm()
    error = error / want.detach().double().cpu().norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def assert_twice_as_good(kernel: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str = "output") -> None:
    """The 2x rule: at most twice the error of plain torch in the same dtype, both against float64."""
    ours, theirs = relative_error(kernel, exact), relative_error(plain, exact)
    assert isfinite(ours), f"{name}: NaN, infinite or of the wrong shape"
    assert isfinite(theirs), f"{name}: plain torch is NaN, infinite or of the wrong shape; nothing to compare with"
    assert ours <= 2 * theirs + 1e-6, f"{name}: relative error {ours:.3g}, plain torch {theirs:.3g}"
