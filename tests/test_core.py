"""The C++ core's perturbation, dropout and noise against float64 arithmetic written here and the NumPy generator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error

from stn_fast import _C, random

RHO = (-4.0, 3.0)
NONE, LOWER, UPPER, BOTH = range(4)
# kind, low, high, integer, per_example, responds_with_value
TABLE = [
    (NONE, 0, 0, 0, 1, 0),
    (LOWER, 0.5, 0, 0, 1, 0),
    (UPPER, 0, 2.0, 0, 1, 0),
    (BOTH, 0.0, 0.9, 0, 1, 0),
    (BOTH, -1.0, 4.0, 1, 1, 0),
    (LOWER, 0.0, 0, 0, 0, 0),
    (BOTH, 0.1, 0.8, 0, 1, 1),
    (NONE, 0, 0, 0, 0, 1),
    (BOTH, 0, 24, 1, 0, 1),
]


def poisoned(*shape):
    return torch.full(shape, float("nan"))


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Perturbation


def plain_perturb(location, raw_scale, center, table, eps):
    """Section 2.2 of the maths, in float64 and differentiable: values and response, each (batch, n)."""
    softplus, columns = torch.nn.functional.softplus, []
    lam = location + softplus(raw_scale.clamp(*RHO)) * eps
    for k, (kind, low, high, integer, _, _) in enumerate(table):
        x = lam[:, k]
        value = {
            NONE: x,
            LOWER: low + softplus(x),
            UPPER: high - softplus(-x),
            BOTH: low + (high - low) * torch.sigmoid(x),
        }[kind]
        columns.append(value.floor().detach() if integer else value)
    values = torch.stack(columns, 1)
    by_value = torch.tensor([row[5] for row in table], dtype=torch.bool)
    return values, torch.where(by_value, values, lam - center)


def perturb_forward(location, raw_scale, center, table, batch, first_example=0, seed=3, step=4, threads=1):
    n = len(table)
    """values (n, batch), response (batch, n), noise (n, batch)."""
    out = poisoned(n, batch), poisoned(batch, n), poisoned(n, batch)
    table = torch.tensor(table, dtype=torch.float32)
    inputs = (location, raw_scale, center, table)
    _C.perturb_forward(*map(address, inputs + out), n, batch, first_example, seed, step, *RHO, threads)
    return out


def perturb_backward(gradients, location, raw_scale, table, noise, threads=1, in_rows=False):
    n = len(table)
    out = poisoned(n), poisoned(n)
    table = torch.tensor(table, dtype=torch.float32)
    d_values, d_response = map(address, gradients)
    rest = map(address, (location, raw_scale, table, noise, *out))
    _C.perturb_backward(d_values, in_rows, d_response, *rest, *noise.shape, *RHO, threads)
    return out


def perturbations(table, batch, first_example=0, seed=3, step=4):
    """eps (batch, n) in float64; a hyperparameter shared by the batch has that of example 0."""
    eps = torch.from_numpy(random.normal(seed, step, 0, batch, len(table), first_example)).double()
    shared = torch.tensor([not row[4] for row in table])
    return torch.where(shared, torch.from_numpy(random.normal(seed, step, 0, 1, len(table))).double(), eps)


tables = st.lists(st.sampled_from(TABLE), min_size=1, max_size=17)


@settings(deadline=None, max_examples=60)
@given(table=tables, batch=st.integers(1, 70), first_example=st.integers(0, 2**33), seed=st.integers(0, 2**63 - 1))
def test_perturbation_of_every_kind_follows_the_formulas(table, batch, first_example, seed):
    generator, n = seeded(), len(table)
    location, raw_scale, center = (normals(generator, n) for _ in range(3))
    values, response, noise = perturb_forward(location, raw_scale, center, table, batch, first_example, seed)
    eps = perturbations(table, batch, first_example, seed)
    exact = plain_perturb(location.double(), raw_scale.double(), center.double(), table, eps)
    torch.testing.assert_close(noise.T.double(), eps, rtol=2e-6, atol=1e-6)
    # An integer may differ where its value, before the floor, is a rounding error away from the next one.
    unrounded = [(*row[:3], 0, *row[4:]) for row in table]
    before, _ = plain_perturb(location.double(), raw_scale.double(), center.double(), unrounded, eps)
    integer = torch.tensor([bool(row[3]) for row in table])
    undecided = integer & ((before - before.round()).abs() < 1e-5)
    for got, want in zip((values.T, response), exact, strict=True):
        torch.testing.assert_close(
            torch.where(undecided, 0, got.double()), torch.where(undecided, 0, want), rtol=4e-6, atol=4e-6
        )


@settings(deadline=None, max_examples=60)
@given(
    table=tables,
    batch=st.integers(1, 600),
    wanted=st.tuples(*[st.booleans()] * 2).filter(any),
    first_example=st.integers(0, 9),
    in_rows=st.booleans(),
)
def test_gradients_of_location_and_scale_match_float64_autograd(table, batch, wanted, first_example, in_rows):
    generator, n = seeded(1), len(table)
    location, raw_scale = normals(generator, n), 3 * normals(generator, n)
    d_values, d_response = (normals(generator, batch, n) for _ in range(2))
    laid_out = d_values if in_rows else d_values.T.contiguous()
    given_in = [d if w else None for d, w in zip((laid_out, d_response), wanted, strict=True)]
    *_, noise = perturb_forward(location, raw_scale, torch.zeros(n), table, batch, first_example)
    got = perturb_backward(given_in, location, raw_scale, table, noise, in_rows=in_rows)

    leaves = [location.double().requires_grad_(), raw_scale.double().requires_grad_()]
    outputs = plain_perturb(*leaves, torch.zeros(n), table, perturbations(table, batch, first_example))
    gradients = (d_values, d_response)
    loss = sum((y * d.double()).sum() for y, d, w in zip(outputs, gradients, wanted, strict=True) if w)
    want = torch.autograd.grad(loss, leaves) if loss.requires_grad else [torch.zeros(n)] * 2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5 * math.sqrt(batch))


def test_scale_gradient_vanishes_outside_of_the_clamp_and_passes_on_its_edges():
    raw_scale = torch.tensor([-4.001, -4.0, 0.0, 3.0, 3.001])
    noise = normals(seeded(), 5, 8)
    _, d_raw_scale = perturb_backward((None, torch.ones(8, 5)), torch.zeros(5), raw_scale, [TABLE[0]] * 5, noise)
    assert (d_raw_scale != 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("where", [-1e30, -1000.0, -60.0, 60.0, 1000.0, 1e30])
def test_no_finite_location_gives_nan_or_infinity(where):
    n, batch = len(TABLE), 40
    location, raw_scale = torch.full((n,), where), torch.full((n,), 3.0)
    out = perturb_forward(location, raw_scale, torch.zeros(n), TABLE, batch)
    gradients = torch.ones(n, batch), torch.ones(batch, n)
    for tensor in (*out, *perturb_backward(gradients, location, raw_scale, TABLE, out[2])):
        assert tensor.isfinite().all()
    bounded = out[0][3]
    assert ((bounded >= 0.0) & (bounded <= 0.9 + 1e-7)).all()


def test_softplus_and_sigmoid_keep_their_relative_precision_far_out():
    location = torch.linspace(-85, 85, 1001)
    table = [(LOWER, 0, 0, 0, 1, 0), (BOTH, 0, 1, 0, 1, 0), (UPPER, 0, 0, 0, 1, 0)]
    for x in location:
        # a tenth of the distance between neighbours is what softplus(-4) adds at most
        values, lam, _ = perturb_forward(x.expand(3).contiguous(), torch.full((3,), -4.0), torch.zeros(3), table, 1)
        exact = lam.double()[0]
        want = torch.stack(
            [
                exact[0].exp().log1p() if exact[0] < 30 else exact[0],
                exact[1].sigmoid(),
                -(-exact[2]).exp().log1p() if exact[2] > -30 else exact[2],
            ]
        )
        assert ((values[:, 0] - want).abs() <= 4 * 2**-23 * want.abs()).all()


def test_a_nan_location_stays_visible():
    n = len(TABLE)
    out = perturb_forward(torch.full((n,), math.nan), torch.zeros(n), torch.zeros(n), TABLE, 3)
    assert all(tensor.isnan().all() for tensor in out[:2])


def test_perturbation_and_its_gradients_do_not_depend_on_the_number_of_threads():
    n, batch, generator = len(TABLE), 2011, seeded()
    location, raw_scale, center = (normals(generator, n) for _ in range(3))
    gradients = normals(generator, n, batch), normals(generator, batch, n)
    results = []
    for threads in (1, 2, 3):
        drawn = perturb_forward(location, raw_scale, center, TABLE, batch, threads=threads)
        results.append(drawn + perturb_backward(gradients, location, raw_scale, TABLE, drawn[2], threads=threads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_two_processes_perturb_as_one_would_the_whole_batch():
    n, generator = len(TABLE), seeded()
    location, raw_scale, center = (normals(generator, n) for _ in range(3))
    whole = perturb_forward(location, raw_scale, center, TABLE, 50)
    halves = [perturb_forward(location, raw_scale, center, TABLE, 25, first) for first in (0, 25)]
    for dim, tensor, parts in zip((1, 0, 1), whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim), tensor)


def test_an_empty_batch_has_zero_gradients():
    n = len(TABLE)
    got = perturb_backward((None, poisoned(0, n)), torch.zeros(n), torch.zeros(n), TABLE, poisoned(n, 0))
    assert all((d == 0).all() for d in got)


# Dropout

LAYOUTS = {
    "flat": lambda outer, middle, last: (middle * last, last, 1),
    "flat over outer": lambda outer, middle, last: (middle * last, last, 1),
    "channels": lambda outer, middle, last: (middle, 1, 0),
    "locked": lambda outer, middle, last: (0, 0, 1),
    "locked over middle": lambda outer, middle, last: (last, 0, 1),
    "locked over outer": lambda outer, middle, last: (0, last, 1),
    "whole example": lambda outer, middle, last: (0, 0, 0),
    "spread channels": lambda outer, middle, last: (0, 3, 0),
}


def plain_dropout(x, rate, strides, first_example=0, seed=3, step=4, stream=5):
    outer, batch, middle, last = x.shape
    steps = (torch.arange(size) * stride for size, stride in zip((outer, middle, last), strides, strict=True))
    i, j, k = steps
    element = (i[:, None, None] + j[:, None] + k)[:, None].expand(outer, batch, middle, last)
    u = torch.from_numpy(random.uniform(seed, step, stream, batch, int(element.max()) + 1, first_example))
    keep = u[torch.arange(batch)[None, :, None, None], element] >= rate[None, :, None, None]
    return keep, torch.where(keep, x.double() / (1 - rate.double())[None, :, None, None], 0)


def dropout(x, rate, strides, first_example=0, seed=3, step=4, stream=5, threads=1):
    y = torch.full_like(x, float("nan"))
    _C.dropout(*map(address, (x, rate, y)), *x.shape, *strides, first_example, seed, step, stream, threads)
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 20), st.integers(1, 90)),
    first=st.integers(0, 2**33),
)
def test_dropout_mask_equals_numpy_bit_for_bit(layout, sizes, first):
    generator, (outer, batch, middle, last) = seeded(), sizes
    x, rate = normals(generator, *sizes), torch.rand(batch, generator=generator)
    strides = LAYOUTS[layout](outer, middle, last)
    keep, want = plain_dropout(x, rate, strides, first)
    y = dropout(x, rate, strides, first)
    assert torch.equal(y != 0, keep & (x != 0))
    assert relative_error(y, want) < 3e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(1, 3, 1, 9001), (2, 2, 1100, 7), (3, 2, 5, 1031)])
def test_long_dropout_does_not_depend_on_the_number_of_threads(layout, sizes):
    x, rate = normals(seeded(), *sizes), torch.linspace(0.1, 0.9, sizes[1])
    strides = LAYOUTS[layout](sizes[0], *sizes[2:])
    _, want = plain_dropout(x, rate, strides)
    results = [dropout(x, rate, strides, threads=threads) for threads in (1, 2, 3)]
    assert relative_error(results[0], want) < 3e-7
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dropout_at_the_edges_of_the_rate_is_exact():
    rate = torch.tensor([0.0, 2**-24, 1.0, 1.5, -0.0])
    x = normals(seeded(), 1, 5, 1, 4000)
    y = dropout(x, rate, (4000, 4000, 1))
    assert torch.equal(y[:, [0, 4]], x[:, [0, 4]])
    assert torch.equal(y[:, 2:4], torch.zeros(1, 2, 1, 4000))


def test_dropped_infinities_and_nans_become_zero():
    x = torch.tensor([math.inf, -math.inf, math.nan]).repeat(100).view(1, 1, 1, 300)
    keep, _ = plain_dropout(x, torch.tensor([0.5]), (300, 300, 1))
    y = dropout(x, torch.tensor([0.5]), (300, 300, 1))
    assert (y[~keep] == 0).all()
    assert not y[keep].isfinite().any()


def test_two_processes_drop_what_one_would_of_the_whole_batch():
    x, rate = normals(seeded(), 2, 6, 1, 33), torch.linspace(0.1, 0.8, 6)
    whole = dropout(x, rate, (33, 33, 1))
    halves = [dropout(x[:, s].contiguous(), rate[s], (33, 33, 1), s.start) for s in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat(halves, 1), whole)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_dropout_touches_nothing_of_an_empty_tensor(sizes):
    guard = torch.full((8,), 7.0)
    _C.dropout(*[guard.data_ptr()] * 3, *sizes, 1, 1, 1, 0, 0, 0, 0, 2)
    assert (guard == 7).all()


# Noise


def noise_forward(x, scale, first_example=0, threads=1):
    y = torch.full_like(x, float("nan"))
    _C.noise_forward(*map(address, (x, scale, y)), *x.shape, first_example, 3, 4, 5, threads)
    return y


def noise_backward(dy, first_example=0, threads=1):
    d_scale = poisoned(dy.shape[1])
    _C.noise_backward(*map(address, (dy, d_scale)), *dy.shape, first_example, 3, 4, 5, threads)
    return d_scale


def plain_normals(outer, batch, inner, first_example=0):
    drawn = torch.from_numpy(random.normal(3, 4, 5, batch, outer * inner, first_example)).double()
    return drawn.view(batch, outer, inner).transpose(0, 1)


@settings(deadline=None, max_examples=60)
@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 300)), first=st.integers(0, 2**33))
def test_noise_and_its_gradient_match_float64(sizes, first):
    generator = seeded()
    x, dy, scale = normals(generator, *sizes), normals(generator, *sizes), normals(generator, sizes[1])
    eps = plain_normals(*sizes, first)
    want = x.double() + scale.double()[:, None] * eps
    torch.testing.assert_close(noise_forward(x, scale, first).double(), want, rtol=1e-6, atol=1e-6)
    want = (dy.double() * eps).sum((0, 2))
    torch.testing.assert_close(noise_backward(dy, first).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 3, 9001), (7, 5, 650)])
def test_noise_does_not_depend_on_the_number_of_threads(sizes):
    x, scale = normals(seeded(), *sizes), torch.ones(sizes[1])
    results = [(noise_forward(x, scale, threads=threads), noise_backward(x, threads=threads)) for threads in (1, 2, 3)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_two_processes_add_the_noise_that_one_would():
    x, scale = normals(seeded(), 2, 6, 33), torch.linspace(0.1, 0.8, 6)
    halves = [noise_forward(x[:, s].contiguous(), scale[s], s.start) for s in (slice(0, 3), slice(3, 6))]
    assert torch.equal(torch.cat(halves, 1), noise_forward(x, scale))


def test_the_noise_gradient_of_examples_without_elements_is_zero():
    assert torch.equal(noise_backward(torch.empty(2, 3, 0)), torch.zeros(3))


def test_the_core_says_what_it_runs_on():
    assert _C.isa() in ("x86-64-v4", "x86-64-v3", "baseline")
    assert _C.vendor() in ("amd", "intel", "other")
    assert isinstance(_C.openmp(), bool)
