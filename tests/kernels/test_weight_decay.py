"""The weight decay penalty of kernels, against every example's own weights and plain torch."""

import pytest
import torch
from numerics import assert_twice_as_good, relative_error
from penalised_weights import one_example_at_a_time, operands

from stn_fast.dispatch import use_backend
from stn_fast.ops.weight_decay import weight_decay_penalty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_kernels(tensors):
    """The penalty and its gradients to W, R and Gw, h and decay being constants."""
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in tensors[:3]]
    with use_backend("triton"):
        penalty = weight_decay_penalty(*leaves, *(t.detach().to(DEVICE) for t in tensors[3:]))
        return [penalty, *torch.autograd.grad(penalty, leaves)]


def defined(tensors, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:3]]
    penalty = one_example_at_a_time(*leaves, *(t.detach().to(dtype) for t in tensors[3:]))
    return [penalty, *torch.autograd.grad(penalty, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "batch", "n"),
    [((6, 5), 4, 3), ((1, 1), 1, 1), ((3, 7, 3, 3), 70, 17), ((5, 1100), 33, 32), ((2, 0), 2, 2)],
)
def test_kernels_obey_the_2x_rule(shape, batch, n, dtype):
    tensors = [t.detach().to(dtype) for t in operands(shape, batch, n)]
    tensors[4] = tensors[4].float()
    names = ("penalty", "dW", "dR", "dGw")
    with use_backend("reference"):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        penalty = weight_decay_penalty(*leaves, *tensors[3:])
        plain = [penalty, *torch.autograd.grad(penalty, leaves)]
    for name, got, in_dtype, exact in zip(
        names, by_kernels(tensors), plain, defined(tensors, torch.float64), strict=True
    ):
        assert got.dtype == in_dtype.dtype
        assert_twice_as_good(got, in_dtype, exact, name)


def test_kernels_compute_only_the_gradients_that_are_asked_for():
    tensors = [t.detach().float().to(DEVICE) for t in operands()]
    want = by_kernels(tensors)[1:]
    for k in range(3):
        tensors[k].requires_grad_()
        with use_backend("triton"):
            (got,) = torch.autograd.grad(weight_decay_penalty(*tensors), tensors[k])
        assert torch.equal(got, want[k])
        tensors[k] = tensors[k].detach()


def test_kernels_have_the_second_derivative_of_plain_torch():
    def second(backend):
        tensors = [t.detach().float().to(DEVICE) for t in operands()]
        leaves = [t.requires_grad_() for t in tensors[:3]]
        with use_backend(backend):
            first = torch.autograd.grad(weight_decay_penalty(*tensors), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got, want) < 1e-6


def test_gradients_to_h_and_decay_are_plain_torch_s_on_every_backend():
    tensors = [t.detach().float().to(DEVICE).requires_grad_() for t in operands()]
    with use_backend("triton"):
        got = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    want = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
