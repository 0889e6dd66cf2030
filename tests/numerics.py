"""How close is close enough: relative errors and the 2x rule."""

from math import isfinite

import torch

from stn_fast.ops.gates import GatedParameters


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


def taking_tensors(definition):
    """`reference` or `fold` of a gated operation, taking the six tensors of its parameters one by one, after x."""

    def flat(*tensors, **options):
        first = 0 if definition.__name__ == "fold" else 1
        parameters = GatedParameters(*tensors[first : first + 6])
        return definition(*tensors[:first], parameters, *tensors[first + 6 :], **options)

    return flat


def taking_tables(definition):
    """`reference` or `fold` of gated_embedding, taking E, R and Gw one by one, after the tokens."""

    def flat(*tensors, **options):
        first = 0 if definition.__name__ == "fold" else 1
        weight, response_weight, weight_gate = tensors[first : first + 3]
        parameters = GatedParameters(weight, None, response_weight, None, weight_gate, None)
        return definition(*tensors[:first], parameters, *tensors[first + 3 :], **options)

    return flat
