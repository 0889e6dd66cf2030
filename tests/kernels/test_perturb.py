"""perturb against the formulas in float64, with eps from the NumPy generator."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_twice_as_good

from stn_fast import random
from stn_fast.kernels.perturb import perturb_backward, perturb_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RHO = dict(rho_min=-4.0, rho_max=3.0)
DRAW = dict(seed=2**40 + 3, first_example=7)
STEP = 5


def case(n):
    """Every kind of hyperparameter in turn: location, raw scale (two outside the interval), center, table."""
    generator = torch.Generator().manual_seed(n)
    location, center = torch.randn(2, n, generator=generator) * 2
    raw_scale = torch.randn(n, generator=generator)
    raw_scale[0], raw_scale[-1] = -5.0, 3.5
    rows = itertools.cycle(itertools.product((0.0, 1.0), (1.0, 0.0), (0.0, 1.0, 2.0, 3.0), (0.0, 1.0)))
    table = torch.tensor([[kind, -0.5, 3.5, i, per, value] for i, per, kind, value in itertools.islice(rows, n)])
    return location, raw_scale, center, table


def formulas(location, raw_scale, center, table, eps):
    """In plain torch, differentiable: (values (n, B), response (B, n))."""
    kind, low, high, integer, per_example, with_value = table.to(location.dtype).unbind(1)
    eps = torch.where(per_example.bool(), eps[1:], eps[:1])  # row 0 is example 0 of the whole batch
    unconstrained = location + F.softplus(raw_scale.clamp(RHO["rho_min"], RHO["rho_max"])) * eps
    value = torch.stack(
        [
            unconstrained,
            low + F.softplus(unconstrained),
            high - F.softplus(-unconstrained),
            low + (high - low) * unconstrained.sigmoid(),
        ]
    ).gather(0, kind.long().expand(1, *unconstrained.shape))[0]
    value = torch.where(integer.bool(), value.floor().detach(), value)
    return value.T, torch.where(with_value.bool(), value, unconstrained - center)


def forward(location, raw_scale, center, table, step, batch, save_noise=True):
    """values (n, B), response (B, n), noise (n, B) where it is saved."""
    out = [torch.empty(shape, device=DEVICE) for shape in ((len(table), batch), (batch, len(table)))]
    noise = torch.empty_like(out[0]) if save_noise else None
    perturb_forward(location, raw_scale, center, table, step, *out, noise, **DRAW, **RHO)
    return *out, noise


def epsilon(batch, n):
    draws = [random.normal(DRAW["seed"], STEP, 0, examples, n, first) for examples, first in ((1, 0), (batch, 7))]
    return torch.cat([torch.from_numpy(draw) for draw in draws])


SHAPES = [(1, 1), (5, 4), (33, 7), (130, 15), (3, 33)]


@pytest.mark.parametrize(("batch", "n"), SHAPES)
def test_samples_are_as_exact_as_plain_torch(batch, n):
    inputs = case(n)
    step = torch.tensor(STEP, device=DEVICE)
    got = forward(*(t.to(DEVICE) for t in inputs), step, batch)
    eps = epsilon(batch, n)
    plain = formulas(*inputs, eps)
    exact = formulas(*(t.double() for t in inputs), eps.double())
    for three in zip(got[:2], plain, exact, strict=True):
        assert_twice_as_good(*three)


def test_noise_is_kept_only_where_it_is_wanted():
    inputs = (*(t.to(DEVICE) for t in case(3)), torch.tensor(STEP, device=DEVICE))
    for one, other in zip(forward(*inputs, 5)[:2], forward(*inputs, 5, save_noise=False)[:2], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", [given for given in itertools.product((True, False), repeat=2) if any(given)])
@pytest.mark.parametrize(("batch", "n"), SHAPES)
def test_gradients_are_as_exact_as_plain_torch(batch, n, given):
    inputs, eps = case(n), epsilon(batch, n)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(shape, generator=generator) for shape in ((n, batch), (batch, n))]

    def plain(dtype):
        location, raw_scale, center, table = (t.to(dtype) for t in inputs)
        leaves = location.requires_grad_(), raw_scale.requires_grad_()
        outputs = formulas(*leaves, center, table, eps.to(dtype))
        loss = sum(
            (y * dy.to(dtype)).sum() for y, dy, is_given in zip(outputs, upstream, given, strict=True) if is_given
        )
        if not loss.requires_grad:  # only integers were given
            return [torch.zeros_like(leaf) for leaf in leaves]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]

    location, raw_scale, center, table = (t.detach().to(DEVICE) for t in inputs)
    *_, noise = forward(location, raw_scale, center, table, torch.tensor(STEP, device=DEVICE), batch)
    got = perturb_backward(
        *(dy.to(DEVICE) if is_given else None for dy, is_given in zip(upstream, given, strict=True)),
        location, raw_scale, table, noise, **RHO,
    )  # fmt: skip
    for three in zip(got, plain(torch.float32), plain(torch.float64), strict=True):
        assert_twice_as_good(*three)


def test_extreme_locations_stay_finite_and_within_bounds():
    location = torch.tensor([1e30, -1e30, 90.0, -90.0, 1e30, -1e30], device=DEVICE)
    table = torch.tensor([[kind, -1.0, 1.0, 0, 1, 1] for kind in (3, 3, 3, 3, 1, 2)], device=DEVICE)
    inputs = location, torch.zeros_like(location), torch.zeros_like(location), table
    outputs = forward(*inputs, torch.tensor(0, device=DEVICE), 9)
    assert all(output.isfinite().all() for output in outputs)
    assert (outputs[0][:4].abs() <= 1).all()


def test_an_empty_batch_has_gradients_of_zero():
    location, raw_scale, _, table = (t.to(DEVICE) for t in case(3))
    noise = torch.empty(3, 0, device=DEVICE)
    got = perturb_backward(None, None, location, raw_scale, table, noise, **RHO)
    assert all((gradient == 0).all() for gradient in got)
