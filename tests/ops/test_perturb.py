import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error

from stn_fast import random
from stn_fast.dispatch import choose, use_backend
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.ops.perturb import Perturbed, perturb, perturbation_noise, reference

SPACE = HyperparameterSpace(
    [
        Hyperparameter("rate", low=0.0, high=0.9, init=0.05),
        Hyperparameter("holes", low=0, high=4, init=1.5, integer=True, scale=1.0),
        Hyperparameter("decay", low=0.0, init=1e-4, per_example=False),
        Hyperparameter("ceiling", high=2.0, init=-3.0, scale=0.1),
        Hyperparameter("free", init=2.0, response="raw", scale=2.0),
        Hyperparameter("valued", low=-1.0, high=1.0, init=0.5, response="value"),
        Hyperparameter("whole_value", low=2, init=5.5, integer=True),
    ]
)
SPACE._table[-1, 5] = 1  # responds with its value, as no Hyperparameter that is an integer may
N = len(SPACE)


def arguments(device="cpu", requires_grad=True):
    location, raw_scale = (t.requires_grad_(requires_grad) for t in SPACE.initial_state(device))
    table, center = SPACE._constants(location.device)
    return location, raw_scale, center, table


def draw(arguments_, batch_size, *, seed=3, step=5, first_example=0):
    device = arguments_[0].device
    step = torch.tensor(step, device=device)
    return perturb(*arguments_, step=step, seed=seed, batch_size=batch_size, first_example=first_example)


def by_definition(arguments_, batch_size, dtype, *, seed=3, step=5, first_example=0):
    location, raw_scale, center, table = arguments_
    noise = perturbation_noise(table, torch.tensor(step), seed, batch_size, first_example).to(dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (location, raw_scale)]
    return leaves, reference(*leaves, center.to(dtype), table.to(dtype), noise)


def draw_of(where, batch_size):
    return where.get("seed", 3), batch_size, where.get("first_example", 0)


def gradients(results: Perturbed, leaves, upstream):
    total = sum((r * u.to(r.dtype)).sum() for r, u in zip(results, upstream, strict=True) if u is not None)
    return torch.autograd.grad(total, leaves, retain_graph=True)


@settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(1, 200),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    first=st.integers(0, 2**31),
)
@use_backend("cpp")
def test_core_samples_and_differentiates_as_exactly_as_plain_torch(batch_size, seed, step, first):
    check(arguments(), batch_size, seed=seed, step=step, first_example=first)


@pytest.mark.parametrize("batch_size", [1, 31, 33])
def test_every_backend_samples_and_differentiates_as_exactly_as_plain_torch(backend, batch_size):
    check(arguments(backend), batch_size)


def check(arguments_, batch_size, **where):
    ours = draw(arguments_, batch_size, **where)
    plain_leaves, plain = by_definition(arguments_, batch_size, torch.float32, **where)
    exact_leaves, exact = by_definition(arguments_, batch_size, torch.float64, **where)
    # An integer's floor may fall on either side of a step; where it does, only a tie may be at fault.
    _, _, _, table = arguments_
    whole = table[:, 3] > 0
    assert ((ours.values - exact.values)[:, whole].abs() <= 1).all()
    for name, one, two, three in zip(Perturbed._fields, ours, plain, exact, strict=True):
        assert_twice_as_good(one[:, ~whole], two[:, ~whole], three[:, ~whole], name)
    # Terms of one sign: a sum that cancels would show the few ulp of the normal draws, not the error of the sum.
    weights = torch.rand(2, batch_size, N, generator=torch.Generator().manual_seed(1)).to(ours.values.device)
    sign = perturbation_noise(table, torch.tensor(where.get("step", 5)), *draw_of(where, batch_size)).sign()
    for k, (name, upstream) in enumerate({"location": weights, "raw_scale": weights * sign}.items()):
        for asked in ([0, 1], [0], [1]):
            chosen = [u if i in asked else None for i, u in enumerate(upstream)]
            one = gradients(ours, arguments_[:2], chosen)[k]
            two, three = gradients(plain, plain_leaves, chosen)[k], gradients(exact, exact_leaves, chosen)[k]
            assert_twice_as_good(one, two, three, f"gradient {asked} to {name}")


def test_gradients_of_the_definition_match_finite_differences():
    location, raw_scale, center, table = (t.detach().double() for t in arguments())
    noise = torch.randn(4, N, dtype=torch.float64)
    smooth = (table[:, 3] == 0).nonzero().flatten()
    picked = [t[smooth] for t in (location, raw_scale, center, table)]

    def outputs(location_, raw_scale_):
        return tuple(reference(location_, raw_scale_, picked[2], picked[3], noise[:, smooth]))

    assert torch.autograd.gradcheck(outputs, [t.clone().requires_grad_() for t in picked[:2]])


def test_perturbation_follows_the_formula_of_the_paper(backend):
    """λ̃ = λ + σ ε with ε from the generator, value by the stated transforms: against plain Python floats."""
    results = draw(arguments(backend, requires_grad=False), 3)
    epsilon = random.normal(3, 5, 0, 3, N)
    location, _ = SPACE.initial_state()
    transforms = {
        "rate": lambda v: 0.9 / (1 + math.exp(-v)),
        "holes": lambda v: math.floor(4 / (1 + math.exp(-v))),
        "decay": lambda v: math.log1p(math.exp(v)),
        "ceiling": lambda v: 2.0 - math.log1p(math.exp(-v)),
        "free": lambda v: v,
        "valued": lambda v: -1 + 2 / (1 + math.exp(-v)),
        "whole_value": lambda v: math.floor(2 + math.log1p(math.exp(v))),
    }
    for k, hyperparameter in enumerate(SPACE):
        for b in range(3):
            noise = epsilon[b if hyperparameter.per_example else 0, k]
            perturbed = location[k].item() + hyperparameter.scale * float(noise)
            value = transforms[hyperparameter.name](perturbed)
            response = "value" if hyperparameter.name == "whole_value" else hyperparameter.response
            want = {"shifted": perturbed - location[k].item(), "raw": perturbed, "value": value}[response]
            assert results.values[b, k].item() == pytest.approx(value, rel=1e-5, abs=1e-5)
            assert results.response[b, k].item() == pytest.approx(want, rel=1e-5, abs=2e-5)


def test_backends_agree_on_every_draw(backend):
    """Same seed, same hyperparameters, whichever backend: equal up to the rounding of float32."""
    ours = draw(arguments(backend, requires_grad=False), 2000)
    _, exact = by_definition(arguments(), 2000, torch.float64)
    assert relative_error(ours.response, exact.response) < 1e-6


def test_two_halves_of_a_batch_draw_the_same_as_the_whole(backend):
    whole = draw(arguments(backend, requires_grad=False), 10)
    halves = [draw(arguments(backend, requires_grad=False), 5, first_example=first) for first in (0, 5)]
    for field in Perturbed._fields:
        assert torch.equal(torch.cat([getattr(h, field) for h in halves]), getattr(whole, field))


def test_a_per_batch_hyperparameter_is_equal_for_all_examples(backend):
    results = draw(arguments(backend, requires_grad=False), 9, first_example=4)
    column = SPACE.index("decay")
    assert (results.values[:, column] == results.values[0, column]).all()
    assert len(set(results.values[:, SPACE.index("rate")].tolist())) == 9


def test_no_integer_gradient_through_its_floor_but_one_through_the_response():
    args = arguments()
    results = draw(args, 8)
    holes, whole_value = SPACE.index("holes"), SPACE.index("whole_value")
    (through_values,) = torch.autograd.grad(results.values.sum(), args[0], retain_graph=True)
    (through_response,) = torch.autograd.grad(results.response.sum(), args[0])
    assert through_values[holes] == 0
    assert through_response[holes] == 8
    assert through_response[whole_value] == 0


@pytest.mark.parametrize("extreme", [-1e30, -80.0, 80.0, 1e30])
def test_extreme_locations_give_no_nan(backend, extreme):
    args = list(arguments(backend))
    args[0] = torch.full_like(args[0], extreme).requires_grad_()
    results = draw(args, 5)
    grads = torch.autograd.grad(sum(r.clamp(-1, 1).sum() for r in results), args[:2])
    assert not any(t.isnan().any() for t in (*results, *grads))
    assert (results.values[:, 0] >= 0).all()
    assert (results.values[:, 0] <= 0.9).all()


def test_scale_stays_in_its_interval_and_its_gradient_stops_outside(backend):
    args = list(arguments(backend))
    args[1] = torch.full_like(args[1], 50.0).requires_grad_()
    results = draw(args, 2000)
    spread = results.response[:, 0].std().item()
    assert spread == pytest.approx(math.log1p(math.exp(3.0)), rel=0.1)
    assert (torch.autograd.grad(results.response.square().sum(), args[1])[0] == 0).all()


def test_noise_is_standard_normal(backend):
    interpreted = choose(torch.device(backend)) == "triton" and backend == "cpu"  # slow; it agrees on every draw
    results = draw(arguments(backend, requires_grad=False), 2000 if interpreted else 20000)
    _, raw_scale = (t.to(backend) for t in SPACE.initial_state())
    noise = (results.response / SPACE.scales(raw_scale))[:, 0].double().cpu().numpy()
    bound = 5 / math.sqrt(len(noise))
    assert abs(noise.mean()) < bound
    assert abs(noise.var() - 1) < 2 * bound
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < bound


def test_empty_batch(backend):
    args = arguments(backend)
    results = draw(args, 0)
    assert [tuple(r.shape) for r in results] == [(0, N)] * 2
    assert all((g == 0).all() for g in torch.autograd.grad(sum(r.sum() for r in results), args[:2]))


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args = arguments()
            drawn = draw(args, 5000)
            results.append([*drawn, *torch.autograd.grad(sum(r.square().sum() for r in drawn), args[:2])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_registration_is_complete(backend):
    location, raw_scale, center, table = arguments(backend)
    step = torch.tensor(5, device=backend)
    for save_noise in (True, False):
        arguments_ = (location, raw_scale, center, table, step, 3, 7, 0, save_noise)
        if save_noise:
            torch.library.opcheck(torch.ops.stn_fast.perturb.default, arguments_)
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments_]
        torch.library.opcheck(torch.ops.stn_fast.perturb.default, tuple(detached))


def test_forward_mode_tangent_is_not_silently_zero():
    location, raw_scale, center, table = arguments(requires_grad=False)

    def response(location_, raw_scale_):
        return draw((location_, raw_scale_, center, table), 4).response

    ones = torch.ones(N)
    _, tangent = torch.func.jvp(response, (location, raw_scale), (ones, ones))
    noise = perturbation_noise(table, torch.tensor(5), 3, 4, 0)
    plain = table[:, 5] == 0
    assert relative_error(tangent[:, plain], (1 + raw_scale.sigmoid() * noise)[:, plain]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(location=torch.zeros(N + 1)), rf"location must be \({N},\) float32.*got \({N + 1},\)"),
        (dict(raw_scale=torch.zeros(N, dtype=torch.float64)), r"raw_scale .*float64"),
        (dict(center=torch.zeros(N, device="meta")), r"center is on meta"),
        (dict(table=torch.zeros(N, 6, dtype=torch.float64)), r"table must be contiguous \(n, 6\) float32.*float64"),
        (dict(table=torch.zeros(N, 3)), r"table must be contiguous \(n, 6\) float32.*3\)"),
        (dict(table=torch.zeros(6, N).T), r"table must be contiguous"),
        (dict(step=torch.tensor(0.5)), r"0-dim int64 tensor.*float32"),
        (dict(first_example=-1), r"first_example must be an int >= 0.*got -1"),
        (dict(batch_size=-1), r"batch_size must be an int >= 0.*got -1"),
        (dict(seed=-1), r"seed must be an int >= 0 and < 2\*\*63, got -1"),
        (dict(seed=2**63), r"seed must be an int >= 0 and < 2\*\*63, got 9223372036854775808"),
    ],
)
def test_wrong_arguments_are_named_in_the_error(change, message):
    names = ("location", "raw_scale", "center", "table")
    given_ = dict(zip(names, arguments(), strict=True), step=torch.tensor(0), seed=0, batch_size=4) | change
    with pytest.raises(ValueError, match=message):
        perturb(**given_)
