import pytest
import torch
from numerics import assert_twice_as_good, relative_error

from stn_fast import random
from stn_fast.dispatch import use_backend
from stn_fast.ops.noise import noise

WHERE = dict(seed=11, step=4, stream=2)


def epsilon(shape, example_dim, first_example=0):
    """ε arranged like x, float64, from the NumPy generator."""
    batch = shape[example_dim]
    others = [s for d, s in enumerate(shape) if d != example_dim]
    drawn = random.normal(11, 4, 2, batch, torch.Size(others).numel(), first_example)
    return torch.from_numpy(drawn).double().view(batch, *others).movedim(0, example_dim)


@pytest.mark.parametrize(
    ("shape", "example_dim"), [((5, 33), 0), ((1, 1), 0), ((7, 5, 13), 1), ((5, 3, 4), 0), ((6,), 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_output_and_gradients_by_the_2x_rule(backend, shape, example_dim, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(backend, dtype).requires_grad_()
    scale = torch.rand(shape[example_dim], device=backend).requires_grad_()
    eps = epsilon(shape, example_dim).to(backend)
    column = [-1 if d == example_dim else 1 for d in range(len(shape))]
    y = noise(x, scale, **WHERE, example_dim=example_dim)
    exact = x.double() + scale.double().view(column) * eps
    assert y.dtype == dtype
    assert_twice_as_good(y, x + scale.to(dtype).view(column) * eps.to(dtype), exact)
    dy = torch.randn_like(x)
    dx, d_scale = torch.autograd.grad(y, (x, scale), dy)
    over = [d for d in range(len(shape)) if d != example_dim]
    want = (dy.double() * eps).sum(over) if over else dy.double() * eps
    plain = (dy * eps.to(dtype)).sum(over) if over else dy * eps.to(dtype)
    assert torch.equal(dx, dy)
    assert_twice_as_good(d_scale, plain.float(), want, "d_scale")


def test_two_halves_of_a_batch_draw_the_same_as_the_whole(backend):
    x, scale = torch.zeros(6, 9, device=backend), torch.ones(6, device=backend)
    halves = [noise(x[i : i + 3], scale[:3], **WHERE, first_example=i) for i in (0, 3)]
    assert torch.equal(torch.cat(halves), noise(x, scale, **WHERE))


def test_nothing_is_stored_for_backward_but_the_step():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        noise(torch.ones(8, 1000, requires_grad=True), torch.ones(8, requires_grad=True), **WHERE)
    assert sum(saved) == 1


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale = torch.ones(301, requires_grad=True)
            y = noise(torch.ones(301, 517), scale, **WHERE)
            results.append([y, torch.autograd.grad(y.square().sum(), scale)[0]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_empty_batch(backend):
    scale = torch.ones(0, device=backend, requires_grad=True)
    y = noise(torch.empty(0, 5, device=backend), scale, **WHERE)
    assert torch.autograd.grad(y.sum(), scale)[0].shape == (0,)


def test_registration_is_complete(backend):
    x = torch.randn(5, 6, device=backend, requires_grad=True)
    scale = torch.ones(5, device=backend, requires_grad=True)
    arguments = (x, scale, torch.tensor(4, device=backend), 11, 2, 0, [1, 5, 6])
    torch.library.opcheck(torch.ops.stn_fast.noise.default, arguments)


def test_compiles_without_graph_break_to_the_same_numbers():
    x, scale = torch.randn(5, 6, requires_grad=True), torch.ones(5, requires_grad=True)
    compiled = torch.compile(lambda *t: noise(*t, **WHERE), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, scale), noise(x, scale, **WHERE))


def test_float64_is_exact(device):
    x = torch.randn(5, 33, dtype=torch.float64, device=device)
    scale = torch.rand(5, device=device, requires_grad=True)
    eps = epsilon((5, 33), 0).to(device)
    y = noise(x, scale, **WHERE)
    assert relative_error(y, x + scale.double()[:, None] * eps) < 1e-14
    (d_scale,) = torch.autograd.grad(y, scale, x)
    assert relative_error(d_scale, (x * eps).sum(1)) < 1e-7


def test_forward_mode_tangent_is_not_silently_zero():
    x, scale = torch.randn(5, 6), torch.rand(5)
    _, tangent = torch.func.jvp(lambda *t: noise(*t, **WHERE), (x, scale), (x, torch.ones(5)))
    assert relative_error(tangent, x + epsilon((5, 6), 0)) < 1e-6


@pytest.mark.parametrize(
    ("x", "scale", "change", "message"),
    [
        (torch.ones(4, 3), torch.ones(3), {}, r"scale must be \(4,\) float32.*got \(3,\)"),
        (torch.ones(4, 3, dtype=torch.int32), torch.ones(4), {}, r"x must be floating point.*int32"),
        (torch.ones(4, 3), torch.ones(4), dict(example_dim=2), r"example_dim=2 is not a dimension"),
        (torch.ones(4, 3), torch.ones(4), dict(stream=0), r"stream must be an int >= 1 and < 2\*\*32"),
    ],
)
def test_wrong_arguments_are_named_in_the_error(x, scale, change, message):
    with pytest.raises(ValueError, match=message):
        noise(x, scale, **(WHERE | change))
