"""The baselines compute what they stand for: a wrong one would make every ratio worthless."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines
from benchmarks.baselines import Limit, Range
from benchmarks.cases import RANGES, Case, gated_linear_inputs

CPU = torch.device("cpu")
CASE = Case("gated_linear", "full", (6, 5, 4), torch.float32, CPU)


def formula(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h):
    """Design 2.1 example by example in float64 NumPy: every example has its own effective weight."""
    rows = []
    for x_b, h_b in zip(x, h, strict=True):
        own_weight = weight + np.diag(weight_gate @ h_b) @ response_weight
        rows.append(own_weight @ x_b + bias + (bias_gate @ h_b) * response_bias)
    return np.stack(rows)


def doubles(tensors):
    return [tensor.double().numpy() for tensor in tensors]


def test_eager_gated_linear_is_the_formula() -> None:
    inputs, _ = gated_linear_inputs(CASE)
    want = formula(*doubles(inputs))
    np.testing.assert_allclose(baselines.gated_linear(*inputs).numpy(), want, rtol=1e-5, atol=1e-6)


def test_concatenated_product_with_the_epilogue_is_the_formula() -> None:
    inputs, _ = gated_linear_inputs(CASE)
    x, weight, bias, response_weight, response_bias, *gates = inputs
    products = x @ torch.cat([weight, response_weight]).T
    got = baselines.gated_epilogue(products, bias, response_bias, *gates)
    np.testing.assert_allclose(got.numpy(), formula(*doubles(inputs)), rtol=1e-5, atol=1e-6)


@pytest.fixture
def limit() -> Limit:
    inputs, dy = gated_linear_inputs(CASE)
    return Limit.of(inputs[0], inputs[1], inputs[3], dy, dy * (inputs[7] @ inputs[5].T))


def test_both_limits_give_the_same_products(limit: Limit) -> None:
    torch.testing.assert_close(limit.forward_one()[0], torch.cat(limit.forward_two(), dim=1))
    dx, both = limit.backward_one(weights=True)
    dx_two, *separate = limit.backward_two(weights=True)
    torch.testing.assert_close(dx, dx_two)
    torch.testing.assert_close(both, torch.cat(separate))


def test_the_limit_computes_the_gradients_that_autograd_finds(limit: Limit) -> None:
    inputs, dy = gated_linear_inputs(CASE)
    limit = Limit.of(inputs[0], inputs[1], inputs[3], dy, dy * (inputs[7] @ inputs[5].T))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    want = torch.autograd.grad(baselines.gated_linear(*leaves), [leaves[k] for k in (0, 1, 3)], dy)
    for got, exact in zip(limit.backward_two(weights=True), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("products", "count"),
    [
        ("forward_one()", 2),
        ("forward_two()", 2),
        ("backward_one(weights=False)", 2),
        ("backward_two(weights=False)", 2),
        ("backward_one(weights=True)", 4),
        ("backward_two(weights=True)", 4),
    ],
)
def test_the_limit_does_the_arithmetic_of_its_products_and_no_more(limit, products, count) -> None:
    batch, inputs, outputs = CASE.shape
    with FlopCounterMode(display=False) as counter:
        eval(f"limit.{products}")
    assert counter.get_total_flops() == count * 2 * batch * inputs * outputs


def test_the_limit_is_no_more_than_the_large_products_of_eager(limit: Limit) -> None:
    """All that eager does beyond it are the products with the gates, of n columns."""
    inputs, _ = gated_linear_inputs(CASE)
    batch, _, outputs = CASE.shape
    n = inputs[7].shape[1]
    with FlopCounterMode(display=False) as bare:
        limit.forward_two()
    with FlopCounterMode(display=False) as eager:
        baselines.gated_linear(*inputs)
    assert eager.get_total_flops() - bare.get_total_flops() == 2 * (2 * batch * n * outputs)


@pytest.mark.parametrize(
    "bounds", [Range(None, None), Range(-1.0, None), Range(None, 2.0), Range(0.0, 24.0), Range(0.0, 4.0, True)]
)
def test_constrain_is_the_formula(bounds: Range) -> None:
    unconstrained = torch.linspace(-4, 4, 33)
    lam = unconstrained.double().numpy()
    low, high, integer = bounds
    if low is None and high is None:
        want = lam
    elif high is None:
        want = low + np.log1p(np.exp(lam))
    elif low is None:
        want = high - np.log1p(np.exp(-lam))
    else:
        want = low + (high - low) / (1 + np.exp(-lam))
    want = np.floor(want) if integer else want
    np.testing.assert_allclose(baselines.constrain(unconstrained, bounds).numpy(), want, rtol=1e-5, atol=1e-6)


def test_eager_perturbation_has_the_stated_moments_and_gradients() -> None:
    torch.manual_seed(0)
    n, batch = len(RANGES), 20000
    location = torch.linspace(-1, 1, n, requires_grad=True)
    raw_scale = torch.full((n,), -0.5, requires_grad=True)
    center = torch.ones(n)
    values, response = baselines.perturb(location, raw_scale, center, RANGES, batch)
    sigma = np.log1p(np.exp(-0.5))
    np.testing.assert_allclose(response.mean(0).detach(), (location - center).detach(), atol=5 * sigma / batch**0.5)
    np.testing.assert_allclose(response.std(0).detach(), sigma, rtol=0.05)
    columns = [baselines.constrain((response + center)[:, k], bounds) for k, bounds in enumerate(RANGES)]
    torch.testing.assert_close(values, torch.stack(columns, dim=1), rtol=1e-5, atol=1e-5)
    (d_location,) = torch.autograd.grad(response.sum(), location)
    np.testing.assert_allclose(d_location, batch)


@pytest.mark.parametrize(
    ("shape", "example_dim", "shared"), [((64, 400), 0, ()), ((64, 30, 4, 4), 0, (2, 3)), ((6, 64, 50), 1, (0,))]
)
def test_eager_dropout_keeps_one_minus_rate_and_shares_its_mask(shape, example_dim, shared) -> None:
    torch.manual_seed(0)
    rate = torch.full((64,), 0.3)
    y = baselines.dropout(torch.ones(shape), rate, example_dim, shared)
    assert set(np.round(y.unique().tolist(), 4)) == {0.0, np.round(1 / 0.7, 4)}
    assert abs((y == 0).float().mean().item() - 0.3) < 0.05
    for dim in shared:
        assert (y == y.narrow(dim, 0, 1)).all()
