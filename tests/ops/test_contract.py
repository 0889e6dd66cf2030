"""What every gated operation must pass: each test runs for each of `contract.OPERATIONS`."""

from contextlib import nullcontext

import pytest
import torch
from contract import OPERATIONS
from contract_checks import (
    assert_as_good_as_plain_torch,
    assert_defaults_of_torch_do_not_matter,
    assert_gradients_do_not_depend_on_what_else_is_wanted,
    assert_registration_is_complete,
    assert_same,
    assert_threads_do_not_matter,
    assert_within_twice,
    compute,
    drawn_like,
    gradients,
    leaves,
    subsets,
)
from flops import flops_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import relative_error
from torch.autograd import forward_ad

from stn_fast.dispatch import choose, use_backend
from stn_fast.ops import products

HALVES = [torch.float16, torch.bfloat16]


def each(attribute):
    """Every operation with each of its variants, or of the other sizes and options that it names."""
    cases = [(operation, *item) for operation in OPERATIONS for item in getattr(operation, attribute).items()]
    return pytest.mark.parametrize(
        ("operation", "changes"), [pytest.param(o, changes, id=f"{o.name}: {name}") for o, name, changes in cases]
    )


each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
each_variant = each("variants")
in_every_mode = each("modes")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
# Not called dtype: that is what operands are of, and which backends compute them.
cast_to = pytest.mark.parametrize("narrow", HALVES, ids=str)


def rounding(device):
    """How far two calls may be apart: cuDNN's gradients of filters are sums in any order."""
    return 0.0 if device == "cpu" else 1e-5


# The definition


@each_variant
def test_the_definition_is_the_plain_layer_with_each_examples_own_weights(operation, changes):
    problem = operation.problem(torch.float64, **changes)
    inputs = problem.operands.values()
    examples = [problem.alone(b, *inputs) for b in range(len(problem.operands["h"]))]
    for i, (result, dim) in enumerate(zip(problem.definition(*inputs), problem.results.values(), strict=True)):
        assert relative_error(result, torch.stack([example[i] for example in examples], dim)) < 1e-14


@each_variant
def test_derivatives_of_the_definition_match_finite_differences(operation, changes):
    """In reverse and in forward mode."""
    problem = operation.problem(torch.float64, **(changes | operation.tiny))
    inputs = tuple(leaves(problem.operands).values())
    assert torch.autograd.gradcheck(problem.definition, inputs, check_forward_ad=True)


# Values and gradients


@dtypes
@each_variant
def test_results_and_gradients_obey_the_2x_rule(operation, changes, backend, dtype):
    assert_as_good_as_plain_torch(operation.problem(dtype, backend, **changes))


@each_variant
def test_results_are_laid_out_as_those_of_plain_torch(operation, changes, backend):
    problem = operation.problem(device=backend, **changes)
    for ours, plain in zip(*(f(*problem.operands.values()) for f in (problem.call, problem.definition)), strict=True):
        several = [dim for dim, size in enumerate(ours.shape) if size > 1]
        assert [ours.stride(dim) for dim in several] == [plain.stride(dim) for dim in several]


@each_operation
@settings(
    # Drawn alike at every run: a sum of few numbers may cancel to less than its rounding, and pass or fail by chance.
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
@given(data=st.data())
@use_backend("cpp")
def test_the_core_obeys_the_2x_rule_at_any_size(operation, data):
    sizes = data.draw(st.fixed_dictionaries(dict(operation.any_size)))
    assert_as_good_as_plain_torch(operation.problem(**sizes))


@each_variant
def test_float64_is_exact(operation, changes, device):
    problem = operation.problem(torch.float64, device, **changes)
    assert_same(compute(problem, problem.call), compute(problem, problem.definition), 1e-13)


@pytest.mark.parametrize(
    ("operation", "rank"),
    [(operation, rank) for operation in OPERATIONS for rank in (None, 2) if not (rank and operation.composed)],
    ids=lambda value: getattr(value, "name", value and f"rank {value}"),
)
def test_exactly_the_wanted_gradients_are_computed_and_are_the_same_numbers(operation, rank, backend):
    interpreted = choose(torch.device(backend)) == "triton"
    problem = operation.problem(device=backend, rank=rank, **(operation.tiny if interpreted else {}))
    assert_gradients_do_not_depend_on_what_else_is_wanted(operation, problem, few=interpreted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "operation", [operation for operation in OPERATIONS if operation.large], ids=lambda operation: operation.name
)
def test_frozen_parameters_cost_no_product(operation, dtype, monkeypatch):
    """A validation step multiplies by the weights forward and backward, and nothing to get gradients of them."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")  # the other's are not counted
    problem = operation.problem(dtype, **operation.large)

    def flops(wanted):
        inputs = leaves(problem.operands, wanted)
        forward = flops_of(lambda: problem.call(*inputs.values()))
        results = problem.call(*inputs.values())
        return forward, flops_of(lambda: gradients(results, inputs, drawn_like(results, dtype)))

    forward, frozen = flops(("x", "h"))
    assert frozen < 1.1 * forward
    assert 1.9 * forward < flops(None)[1] < 2.2 * forward


@each("edges")
def test_sizes_of_0_and_1_obey_the_2x_rule(operation, changes, backend):
    """The seed is one for which no single number is the small difference of large ones."""
    assert_as_good_as_plain_torch(operation.problem(device=backend, seed=1, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_variant
def test_one_h_for_all_examples_is_the_same_h_for_each(operation, changes, dtype):
    """torch may have an implementation for every gradient that may be wanted of the plain layer it then is."""
    problem = operation.problem(dtype, **changes).shared()
    exact, plain = (compute(problem, problem.definition, dtype=of) for of in (torch.float64, dtype))
    for wanted in subsets(problem.operands, few=True):
        got = compute(problem, problem.call, wanted)
        if dtype == torch.float64:
            assert_same(got, {name: exact[name] for name in got}, 1e-12)
        else:
            assert_within_twice(got, plain, exact)


# Operands and gradients whose memory is not simply theirs, in order


def transposed(tensor):
    """The first dimension is the fastest."""
    dims = range(tensor.ndim - 1, -1, -1)
    return tensor.permute(*dims).contiguous().permute(*dims)


def with_gaps(tensor):
    """NaN before, after and between its numbers."""
    wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1] = tensor
    return wide[..., 1]


def negated(tensor):
    """Its memory holds the opposite."""
    return torch._neg_view(-tensor)


def expanded(tensor):
    """One number for all."""
    return torch.full((), 0.7, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


@pytest.mark.parametrize("laid", [transposed, with_gaps, negated], ids=lambda laid: laid.__name__)
@each_operation
def test_operands_are_read_however_they_lie_in_memory(operation, laid, backend):
    problem = operation.problem(device=backend)
    odd = problem._replace(operands={name: laid(tensor) for name, tensor in problem.operands.items()})
    assert_same(compute(odd, problem.call), compute(problem, problem.call), 1e-6)
    with torch.no_grad():
        want = problem.call(*problem.operands.values())
        for ours, wish in zip(problem.call(*odd.operands.values()), want, strict=True):
            assert relative_error(ours, wish) < 1e-6


@pytest.mark.parametrize("laid", [transposed, with_gaps, negated, expanded], ids=lambda laid: laid.__name__)
@in_every_mode
def test_gradients_that_come_in_are_read_however_they_lie_in_memory(operation, changes, laid, backend):
    problem = operation.problem(device=backend, **changes)

    def odd(results, dtype):
        return [laid(d) for d in drawn_like(results, dtype)]

    def even(results, dtype):
        return [d.clone(memory_format=torch.contiguous_format).resolve_neg() for d in odd(results, dtype)]

    got, want = (compute(problem, problem.call, incoming=incoming) for incoming in (odd, even))
    assert_same(got, want, 1e-6)


@in_every_mode
def test_backward_leaves_what_it_reads_as_it_was(operation, changes, backend):
    """The same graph twice, as retain_graph promises, with the gradients that came in and the operands."""
    problem = operation.problem(device=backend, **changes)
    inputs = leaves(problem.operands)
    results = problem.call(*inputs.values())
    incoming = drawn_like(results, torch.float32)
    first = gradients(results, inputs, incoming, retain_graph=True)
    assert_same(gradients(results, inputs, incoming), first, rounding(backend))
    assert all(map(torch.equal, incoming, drawn_like(results, torch.float32)))
    assert all(map(torch.equal, inputs.values(), operation.problem(device=backend, **changes).operands.values()))


@in_every_mode
@use_backend("cpp")
def test_the_default_dtype_and_device_of_torch_do_not_change_what_the_core_computes(operation, changes):
    assert_defaults_of_torch_do_not_matter(operation.problem(**changes))


@each_operation
@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads(operation):
    assert_threads_do_not_matter(operation, operation.problem(**operation.many))


# Modes of torch


@pytest.mark.parametrize("around", ["forward", "forward and backward"])
@cast_to
@in_every_mode
def test_autocast_casts_operands_and_returns_gradients_in_their_own_dtype(operation, changes, narrow, around, device):
    problem = operation.problem(device=device, **changes)
    inputs = leaves(problem.operands)
    with torch.autocast(device, dtype=narrow):
        results = problem.call(*inputs.values())
    incoming = drawn_like(results, narrow)
    with torch.autocast(device, dtype=narrow) if around == "forward and backward" else nullcontext():
        got = gradients(results, inputs, incoming)
    got |= dict(zip(problem.results, results, strict=True))

    def cast(*operands):
        return problem.definition(*(operand.to(narrow) for operand in operands))

    def of(function, to):
        return compute(problem, function, dtype=to, incoming=lambda *_: incoming)

    if operation.casts:
        assert all(got[name].dtype == narrow for name in problem.results)
        assert_within_twice(got, of(cast, None), of(problem.definition, torch.float64))
    else:
        assert_same(got, of(problem.call, None))


@cast_to
@in_every_mode
def test_autocast_around_the_backward_pass_alone_changes_nothing(operation, changes, narrow, backend):
    """The core is given addresses: a product in 16 bits would be misread."""
    problem = operation.problem(device=backend, **changes)
    inputs = leaves(problem.operands)
    results = problem.call(*inputs.values())
    incoming = drawn_like(results, torch.float32)
    want = gradients(results, inputs, incoming, retain_graph=True)
    with torch.autocast(backend, dtype=narrow):
        got = gradients(results, inputs, incoming)
    assert_same(got, want, rounding(backend))


@each_operation
def test_autocast_leaves_float64_alone_as_torch_does(operation, device):
    problem = operation.problem(torch.float64, device)
    want = compute(problem, problem.call)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same(compute(problem, problem.call), want, rounding(device))


@in_every_mode
def test_compiles_without_graph_break_to_the_same_numbers(operation, changes):
    problem = operation.problem(**changes)
    torch.compiler.reset()
    compiled = torch.compile(problem.call, fullgraph=True, backend="aot_eager")
    got, want = compute(problem, compiled), compute(problem, problem.call)
    if operation.composed and "rank" in changes:
        # torch computes the gradient of A, on some CPUs by another routine in a compiled backward pass.
        of_a = [{"d_response_weight": results.pop("d_response_weight")} for results in (got, want)]
        assert_same(*of_a, 1e-6)
    assert_same(got, want)


@pytest.mark.parametrize("shared", [False, True])
@each_operation
def test_forward_mode_tangents_are_those_of_the_definition(operation, shared, device):
    """And not silently zero, of torch.func and of dual tensors."""
    problem, other = (operation.problem(torch.float64, device, seed) for seed in (0, 1))
    problem, other = (p.shared() if shared else p for p in (problem, other))
    primals, tangents = (tuple(p.operands.values()) for p in (problem, other))
    _, want = torch.func.jvp(problem.definition, primals, tangents)
    _, got = torch.func.jvp(problem.call, primals, tangents)
    with forward_ad.dual_level():
        dual = problem.call(*map(forward_ad.make_dual, primals, tangents))
        of_dual = [forward_ad.unpack_dual(result).tangent for result in dual]
    for wish, *both in zip(want, got, of_dual, strict=True):
        assert wish.any()
        assert all(relative_error(tangent, wish) < 1e-12 for tangent in both)


@each_operation
def test_tangents_carry_gradients(operation):
    """Delta-STN differentiates the tangent in h itself with respect to the gates."""
    problem = operation.problem(torch.float64)
    found = []
    for function in (problem.call, problem.definition):
        *inputs, h = leaves(problem.operands).values()
        _, tangents = torch.func.jvp(lambda h_, f=function, i=inputs: f(*i, h_), (0 * h,), (torch.ones_like(h),))
        total = sum(tangent.square().sum() for tangent in tangents)
        found.append(torch.autograd.grad(total, inputs, materialize_grads=True))
    assert any(gradient.any() for gradient in found[1])
    assert all(relative_error(got, want) < 1e-12 for got, want in zip(*found, strict=True))


@pytest.mark.parametrize("shared", [False, True])
@each_operation
def test_works_under_grad_and_vmap_of_torch_func(operation, shared):
    problem = operation.problem(torch.float64)
    problem = problem.shared() if shared else problem
    inputs = list(problem.operands.values())

    def total(function):
        return lambda *operands: sum(result.square().sum() for result in function(*operands))

    every = tuple(range(len(inputs)))
    want = torch.autograd.grad(total(problem.definition)(*(of := list(leaves(problem.operands).values()))), of)
    for got, wish in zip(torch.func.grad(total(problem.call), every)(*inputs), want, strict=True):
        assert relative_error(got, wish) < 1e-12
    for k in (0, len(inputs) - 1):
        stacked = torch.stack([inputs[k], 2 * inputs[k]])
        many = torch.vmap(problem.call, tuple(0 if i == k else None for i in every))(
            *(stacked if i == k else tensor for i, tensor in enumerate(inputs))
        )
        doubled = problem.definition(*(2 * tensor if i == k else tensor for i, tensor in enumerate(inputs)))
        assert all(relative_error(got[1], wish) < 1e-12 for got, wish in zip(many, doubled, strict=True))


@pytest.mark.parametrize("power", [1, 2])
@each_operation
def test_second_derivatives_in_reverse_mode_raise_instead_of_lying(operation, power, backend):
    problem = operation.problem(device=backend)
    inputs = list(leaves(problem.operands).values())
    total = sum(result.pow(power).sum() for result in problem.call(*inputs))
    first = torch.autograd.grad(total, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(gradient.sum() for gradient in first), inputs, allow_unused=True)


@each("registered")
def test_registration_is_complete(operation, changes, backend):
    by_itself = {"cpu": "cpp", "cuda": "triton"}[backend]
    traced = choose(torch.device(backend)) == by_itself
    assert_registration_is_complete(operation, operation.problem(device=backend, **changes), traced)


@each_operation
def test_a_rank_of_0_is_refused(operation):
    problem = operation.problem(rank=0)
    with pytest.raises(ValueError, match="must have a rank of at least 1"):
        problem.call(*problem.operands.values())
