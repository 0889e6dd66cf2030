"""What the tests of gated operations compute of a `contract.Problem`, and how they compare it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from contract import GatedOperation, Problem, Results
from numerics import assert_twice_as_good, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Computed = dict[str, Tensor]  # results by their names, gradients by "d_" and the names of operands


def drawn_like(results: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of results, the same numbers whatever the dtype rounds them to."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    return [d.to(result.device, dtype) for d, result in zip(drawn, results, strict=True)]


def leaves(
    operands: Mapping[str, Tensor], wanted: Collection[str] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The same numbers in a dtype; those that are wanted, by default all, require a gradient."""
    return {
        name: tensor.detach().to(dtype or tensor.dtype).requires_grad_(wanted is None or name in wanted)
        for name, tensor in operands.items()
    }


def gradients(
    results: Sequence[Tensor], inputs: Mapping[str, Tensor], incoming: Sequence[Tensor | None], **options: Any
) -> Computed:
    """Of the inputs that require one; no gradient comes in for a result for which None is given."""
    asked = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    used = [(result, d.to(result.dtype)) for result, d in zip(results, incoming, strict=True) if d is not None]
    reached, given = zip(*used, strict=True)
    found = torch.autograd.grad(reached, list(asked.values()), given, materialize_grads=True, **options)
    return {f"d_{name}": gradient for name, gradient in zip(asked, found, strict=True)}


def compute(
    problem: Problem,
    function: Callable[..., Results],
    wanted: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
    incoming: Callable[[Sequence[Tensor], torch.dtype], Sequence[Tensor | None]] = drawn_like,
) -> Computed:
    """Results of `problem.call` or another function of its operands, and the wanted gradients, by default all."""
    inputs = leaves(problem.operands, wanted, dtype)
    results = function(*inputs.values())
    computed = dict(zip(problem.results, results, strict=True))
    if any(tensor.requires_grad for tensor in inputs.values()):
        computed |= gradients(results, inputs, incoming(results, problem.operands["h"].dtype))
    return computed


def assert_within_twice(ours: Computed, plain: Computed, exact: Computed) -> None:
    """The 2x rule for everything that is in `ours`, and its dtype that of plain torch."""
    for name, tensor in ours.items():
        assert tensor.dtype == plain[name].dtype, name
        assert_twice_as_good(tensor, plain[name], exact[name], name)


def assert_as_good_as_plain_torch(problem: Problem, **options: Any) -> None:
    """Results and gradients by the 2x rule; options are those of `compute`."""
    ours, plain = (compute(problem, function, **options) for function in (problem.call, problem.definition))
    assert_within_twice(ours, plain, compute(problem, problem.definition, dtype=torch.float64, **options))


def assert_same(got: Computed, want: Computed, tolerance: float = 0.0) -> None:
    """Equal to the last bit, or up to a relative error."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        if tolerance:
            error = relative_error(tensor, want[name])
            assert error <= tolerance, f"{name}: relative error {error:.3g}"
        else:
            assert torch.equal(tensor, want[name]), name


def subsets(names: Collection[str], few: bool = False) -> list[set[str]]:
    """None of the names, each, all but each and all; unless `few` each pair too, and every subset of up to 8 names."""
    count = len(names)
    sizes = {0, 1, count - 1, count} if few else {0, 1, 2, count - 1, count} if count > 8 else range(count + 1)
    return [set(subset) for size in sizes for subset in itertools.combinations(names, size)]


def assert_gradients_do_not_depend_on_what_else_is_wanted(
    operation: GatedOperation, problem: Problem, few: bool = False
) -> None:
    """Of every subset of gradients exactly those are computed, and are the same numbers."""
    exact, plain = (compute(problem, problem.definition, dtype=dtype) for dtype in (torch.float64, None))
    registered, wanted, counts = operation.module._operation, subsets(problem.operands, few), []
    backward = registered._compute_backward

    def counting(*arguments: Any) -> Any:
        found = backward(*arguments)
        counts.append(sum(gradient is not None for gradient in found))
        return found

    with mock.patch.object(registered, "_compute_backward", counting):
        for names in wanted:
            got = compute(problem, problem.call, names)
            assert got.keys() == {*problem.results, *(f"d_{name}" for name in names)}
            assert_within_twice(got, plain, exact)
    assert counts == [len(names) for names in wanted if names]


def assert_defaults_of_torch_do_not_matter(problem: Problem) -> None:
    """torch.set_default_dtype and torch.device: the core is given memory that is float32 on the CPU."""
    incoming = drawn_like(problem.call(*problem.operands.values()), torch.float32)

    def everything() -> Computed:
        return compute(problem, problem.call, incoming=lambda results, dtype: incoming)

    want = everything()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = everything()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(got, want)
    with torch.device("meta"):
        got = everything()
    assert_same(got, want)


def assert_threads_do_not_matter(operation: GatedOperation, problem: Problem) -> None:
    """To the last bit what the core computes alone; the library's own products may depend on its threads."""
    # Whole numbers make its product of both exact.
    whole = {n: t.round() if "gate" in n or n == "h" else t for n, t in problem.operands.items()}
    problem, before, results = problem._replace(operands=whole), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(compute(problem, problem.call))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0], 1e-5)
        assert all(torch.equal(other[name], results[0][name]) for name in operation.by_core)


class _Recorded(TorchDispatchMode):
    """Notes every call of a registered operation of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "stn_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def assert_registration_is_complete(operation: GatedOperation, problem: Problem, traced: bool = True) -> None:
    """torch.library.opcheck of the registered forward and backward pass, with the arguments of an actual call.

    A trace with symbolic sizes, by far the slowest check, reads what all backends share: only if `traced`.
    """
    with _Recorded() as recorded:
        compute(problem, problem.call)
    (forward, inputs), (backward, kept) = recorded.calls
    assert [call.name() for call in (forward, backward)] == [
        f"stn_fast::{operation.name}", f"stn_fast::{operation.name}_backward",
    ]  # fmt: skip
    assert sum(isinstance(value, Tensor) and value.requires_grad for value in inputs) == len(problem.operands)
    torch.library.opcheck(forward, inputs, test_utils=_CHECKS if traced else _CHECKS[:-1])
    detached = [value.detach() if isinstance(value, Tensor) else value for value in kept]
    torch.library.opcheck(backward, detached, test_utils=("test_schema", "test_faketensor"))


def numbers_saved(problem: Problem, wanted: Collection[str]) -> list[int]:
    """How many numbers each tensor has that is kept for the backward pass."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        problem.call(*leaves(problem.operands, wanted).values())
    return saved
