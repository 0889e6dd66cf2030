import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error

from stn_fast import random
from stn_fast.dispatch import use_backend
from stn_fast.ops.dropout import dropout, mask_layout

WHERE = dict(seed=11, step=4, stream=2)
LAYOUTS = {
    "flat": ((5, 3, 4), 0, ()),
    "row": ((5, 67), 0, ()),
    "channel": ((5, 3, 4, 2), 0, (-2, -1)),
    "locked, time first": ((7, 5, 13), 1, (0,)),
    "locked, batch first": ((5, 7, 13), 0, (1,)),
    "flat, time first": ((7, 5, 13), 1, ()),
    "one for all": ((5, 6), 0, (1,)),
}


def expected_mask(shape, example_dim, shared_dims, rate, seed, step, stream, first_example=0):
    """Keep or drop by looking every position up, one by one, in the NumPy generator."""
    shared = {d % len(shape) for d in shared_dims}
    own = [d for d in range(len(shape)) if d != example_dim and d not in shared]
    elements = 1
    for d in own:
        elements *= shape[d]
    u = random.uniform(seed, step, stream, shape[example_dim], elements, first_example)
    mask = torch.zeros(shape, dtype=torch.bool)
    for position in torch.ones(shape).nonzero().tolist():
        element = 0
        for d in own:
            element = element * shape[d] + position[d]
        b = position[example_dim]
        mask[tuple(position)] = bool(u[b, element] >= rate[b].item())
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_bit_for_bit_those_of_the_generator(backend, layout):
    shape, example_dim, shared_dims = LAYOUTS[layout]
    x = torch.randn(shape, device=backend)
    rate = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], device=backend)
    y = dropout(x, rate, **WHERE, example_dim=example_dim, shared_dims=shared_dims)
    keep = expected_mask(shape, example_dim, shared_dims, rate.cpu(), **WHERE).to(backend)
    per_example = rate.view([-1 if d == example_dim else 1 for d in range(len(shape))])
    assert relative_error(y, torch.where(keep, x / (1 - per_example), 0)) < 1e-6
    assert torch.equal(y == 0, ~keep)


@settings(derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 7), features=st.integers(1, 150), first=st.integers(0, 2**32 - 1), step=st.integers(0, 2**40),
    seed=st.integers(0, 2**63 - 1),
)  # fmt: skip
@use_backend("cpp")
def test_core_masks_for_any_size_and_coordinates(batch, features, first, step, seed):
    where = dict(seed=seed, step=step, stream=2**32 - 1, first_example=first)
    rate = torch.linspace(0.1, 0.9, batch)
    y = dropout(torch.ones(batch, features), rate, **where)
    assert torch.equal(y != 0, expected_mask((batch, features), 0, (), rate, **where))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_by_the_2x_rule_and_backward_redraws_the_mask(backend, dtype):
    x = torch.randn(6, 33, dtype=torch.float64).to(backend, dtype).requires_grad_()
    rate = torch.rand(6, device=backend) * 0.9
    y = dropout(x, rate, **WHERE)
    keep = expected_mask(x.shape, 0, (), rate.cpu(), **WHERE).to(backend)
    exact = x.double() * keep / (1 - rate.double())[:, None]
    plain = x * keep * (1 / (1 - rate))[:, None].to(dtype)
    assert_twice_as_good(y, plain, exact)
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    slope = keep / (1 - rate.double())[:, None]
    assert_twice_as_good(dx, dy * slope.to(dtype), dy.double() * slope, "dx")


def test_dropout_keeps_the_mean_and_has_the_right_variance():
    y = dropout(torch.ones(50, 4000), torch.full((50,), 0.3), **WHERE)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (y != 0).float().mean().item() == pytest.approx(0.7, abs=0.005)


def test_distinct_steps_streams_seeds_and_examples_draw_distinct_masks():
    x, rate = torch.ones(4, 64), torch.full((4,), 0.5)
    masks = [dropout(x, rate, **(WHERE | change)) for change in ({}, dict(step=5), dict(stream=3), dict(seed=12))]
    masks.append(masks[0].roll(1, 0))
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert 0.3 < (one == other).float().mean().item() < 0.7


def test_nothing_is_stored_for_backward_but_rate_and_step():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dropout(torch.ones(8, 1000, requires_grad=True), torch.full((8,), 0.5), **WHERE)
    assert sum(saved) == 8 + 1


def test_step_as_tensor_is_the_step_as_int(backend):
    x, rate = torch.ones(3, 40, device=backend), torch.full((3,), 0.5, device=backend)
    got = dropout(x, rate, **(WHERE | dict(step=torch.tensor(4, device=backend))))
    assert torch.equal(got, dropout(x, rate, **WHERE))


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(dropout(torch.ones(301, 517), torch.full((301,), 0.4), **WHERE))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty_batch(backend):
    x = torch.empty(0, 5, device=backend, requires_grad=True)
    y = dropout(x, torch.empty(0, device=backend), **WHERE)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == (0, 5)


def test_registration_is_complete(backend):
    x = torch.randn(5, 6, device=backend, requires_grad=True)
    rate, step = torch.full((5,), 0.5, device=backend), torch.tensor(4, device=backend)
    arguments = (x, rate, step, 11, 2, 0, [1, 5, 1, 6], [0, 0, 1])
    torch.library.opcheck(torch.ops.stn_fast.dropout.default, arguments)


def test_compiles_without_graph_break_to_the_same_numbers():
    x, rate = torch.randn(5, 6, requires_grad=True), torch.full((5,), 0.5)
    compiled = torch.compile(lambda x_: dropout(x_, rate, **WHERE), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), dropout(x, rate, **WHERE))
    assert torch.equal(
        *(torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda x_: dropout(x_, rate, **WHERE)))
    )


def test_second_derivatives_are_right():
    x, rate = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.full((5,), 0.5)
    assert torch.autograd.gradgradcheck(lambda x_: dropout(x_, rate, **WHERE).pow(3), x)


def test_float64_is_exact(device):
    x, rate = torch.randn(6, 33, dtype=torch.float64, device=device), torch.rand(6, device=device)
    keep = expected_mask(x.shape, 0, (), rate.cpu(), **WHERE).to(device)
    assert relative_error(dropout(x, rate, **WHERE), x * keep / (1 - rate.double())[:, None]) < 1e-14


def test_everything_drops_at_rate_one_under_a_transform_too():
    x, rate = torch.tensor([[1.0, torch.inf], [1.0, 2.0]]), torch.tensor([1.0, 0.0])
    gradient = torch.func.grad(lambda x_: dropout(x_, rate, **WHERE)[0].sum())(x)
    assert torch.equal(gradient, torch.zeros(2, 2))


def test_forward_mode_tangent_is_not_silently_zero():
    x, rate = torch.randn(5, 6), torch.full((5,), 0.5)
    y, tangent = torch.func.jvp(lambda x_: dropout(x_, rate, **WHERE), (x,), (2 * x,))
    assert relative_error(tangent, 2 * y) < 1e-6
    assert relative_error(y, dropout(x, rate, **WHERE)) < 1e-6


@pytest.mark.parametrize(
    ("shape", "example_dim", "shared", "sizes", "strides"),
    [
        ((5, 3, 4), 0, (), [1, 5, 1, 12], [0, 0, 1]),
        ((5, 3, 4, 2), 0, (2, 3), [1, 5, 3, 8], [0, 1, 0]),
        ((7, 5, 13), 1, (0,), [7, 5, 1, 13], [0, 0, 1]),
        ((5, 7, 13), 0, (1,), [1, 5, 7, 13], [0, 0, 1]),
        ((7, 5, 13), 1, (), [7, 5, 1, 13], [13, 0, 1]),
        ((5,), 0, (), [1, 5, 1, 1], [0, 0, 0]),
    ],
)
def test_layouts_collapse_as_documented(shape, example_dim, shared, sizes, strides):
    got_sizes, got_strides = mask_layout(shape, example_dim, shared)
    assert got_sizes == sizes
    assert [s for s, size in zip(got_strides, (sizes[0], *sizes[2:]), strict=True) if size > 1] == [
        s for s, size in zip(strides, (sizes[0], *sizes[2:]), strict=True) if size > 1
    ]


X, RATE = torch.ones(4, 6, 5, 3), torch.full((4,), 0.5)


@pytest.mark.parametrize(
    ("x", "rate", "change", "message"),
    [
        (X, torch.full((5,), 0.5), {}, r"rate must be \(4,\) float32.*got \(5,\)"),
        (X, RATE.double(), {}, r"rate .*float64"),
        (X, RATE.to("meta"), {}, r"on cpu.*on meta"),
        (X, RATE.clone().requires_grad_(), {}, r"rate requires grad.*detach"),
        (X.long(), RATE, {}, r"x must be floating point.*int64"),
        (X, RATE, dict(stream=0), r"stream must be an int >= 1 and < 2\*\*32"),
        (X, RATE, dict(seed=-1), r"seed must be an int >= 0 and < 2\*\*63"),
        (X, RATE, dict(step=-1), r"step must be an int >= 0.*or a 0-dim int64 tensor on cpu, got -1"),
        (X, RATE, dict(first_example=-1), r"first_example must be an int >= 0.*got -1"),
        (X, RATE, dict(step=torch.tensor([1])), r"step must be an int or a 0-dim int64"),
        (X, RATE, dict(example_dim=4), r"example_dim=4 is not a dimension"),
        (X, RATE, dict(shared_dims=(0,)), r"can't be one of shared_dims"),
        (X, RATE, dict(shared_dims=(7,)), r"shared_dims=\(7,\) are not all dimensions"),
        (X, RATE, dict(shared_dims=(2,)), r"too many groups"),
    ],
)
def test_wrong_arguments_are_named_in_the_error(x, rate, change, message):
    with pytest.raises(ValueError, match=message):
        dropout(x, rate, **(WHERE | change))
