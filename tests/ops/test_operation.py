"""The mechanism of operations: what is kept for backward, which gradients come back, and what is refused."""

import itertools

import pytest
import torch
from torch import Tensor

from stn_fast.ops.gates import GatedParameters
from stn_fast.ops.operation import Operation

numbers = itertools.count()
seen: dict[str, object] = {}


def name() -> str:
    """An operation can be registered once a process."""
    return f"test_operation_{next(numbers)}"


def weighted(a: Tensor, b: Tensor, twice: bool) -> tuple[Tensor, Tensor]:
    """(y, q): y = a b, doubled where asked."""
    return a * b * (2 if twice else 1), a + b


def weighted_fake(a: Tensor, b: Tensor, twice: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a)


def weighted_backward(d_y: Tensor, a: Tensor, b: Tensor, y: Tensor | None, twice: bool, wanted: list[bool]):
    seen.update(y=y, wanted=wanted)
    factor = 2 if twice else 1
    return d_y * b * factor, d_y * a * factor


def weighted_operation(**options) -> Operation:
    options = dict(backward=weighted_backward, differentiable=("a", "b"), kept_if={"y": "twice"}) | options
    return Operation(name(), weighted, outputs=("y", "q"), fake=weighted_fake, **options)


def ways(operation):
    """By the eager function, by the registration, and compiled."""
    compiled = torch.compile(lambda *given: operation(*given), fullgraph=True, backend="aot_eager")
    return {"eager": operation, "registered": operation.registered, "compiled": compiled}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_each_input_gets_its_own_gradient_whichever_are_wanted(wanted, twice):
    """`backward` returns both whatever is wanted."""
    for call in ways(weighted_operation()).values():
        a, b = (torch.randn(3, requires_grad=wants) for wants in wanted)
        y, _ = call(a, b, twice)
        y.sum().backward()
        for tensor, other, wants in ((a, b, wanted[0]), (b, a, wanted[1])):
            assert tensor.grad is None if not wants else torch.equal(tensor.grad, other.detach() * (1 + twice))


@pytest.mark.parametrize("twice", [False, True])
def test_an_output_is_kept_only_where_its_flag_says_so(twice):
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    y, _ = weighted_operation()(a, b, twice)
    y.sum().backward()
    assert (seen["y"] is not None) is twice
    assert list(seen["wanted"]) == [True, False]


def test_an_output_that_backward_takes_no_gradient_of_has_none():
    _, q = weighted_operation()(torch.randn(3, requires_grad=True), torch.randn(3), True)
    assert not q.requires_grad


def test_its_registrations_are_complete():
    operation = weighted_operation()
    torch.library.opcheck(operation.registered, (torch.randn(3, requires_grad=True), torch.randn(3), True))


def test_a_node_of_the_graph_has_the_operations_name():
    operation = weighted_operation()
    y, _ = operation(torch.randn(3, requires_grad=True), torch.randn(3), True)
    assert operation._name in y.grad_fn.name()


def test_second_derivatives_raise_instead_of_being_0():
    a = torch.randn(3, requires_grad=True)
    y, _ = weighted_operation()(a, torch.randn(3), True)
    (first,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward.*no autograd formula"):
        first.sum().backward()


def test_a_trace_is_checked_and_computed_as_promised():
    def refuse(a: Tensor, b: Tensor, twice: bool) -> None:
        if len(a) > 3:
            raise ValueError("too long")

    def promised(a: Tensor, b: Tensor, twice: bool) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(a), torch.zeros_like(a)

    operation = weighted_operation(check=refuse, promised=promised)
    with pytest.raises(ValueError, match="too long"):
        operation.registered(torch.randn(4), torch.randn(4), True)
    assert operation(torch.ones(4), torch.ones(4), True)[0].sum() == 8
    assert operation.registered(torch.ones(3), torch.ones(3), True)[0].sum() == 0


def test_gradients_that_are_their_inputs_or_parts_of_one_tensor_are_copied_in_a_trace():
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def fake(a: Tensor, b: Tensor) -> Tensor:
        return torch.empty_like(a)

    def backward(d_y: Tensor, a: Tensor, b: Tensor, wanted: list[bool]):
        both = torch.stack([d_y, d_y])
        return d_y, both[1]

    operation = Operation(name(), forward, outputs=("y",), fake=fake, backward=backward, differentiable=("a", "b"))
    torch.library.opcheck(
        operation.registered, (torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True))
    )
    d_y = torch.randn(3)
    first, second = operation._registered_backward(d_y, d_y, d_y, [True, True])
    assert first.data_ptr() != d_y.data_ptr()
    assert second.untyped_storage().nbytes() == second.nbytes


def test_an_input_may_share_the_gradient_of_an_output_and_gradients_may_be_postprocessed():
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a + 2 * b

    def fake(a: Tensor, b: Tensor) -> Tensor:
        return torch.empty_like(a)

    def backward(d_y: Tensor, b: Tensor, wanted: list[bool]):
        return [2 * d_y]

    def finish(gradients, kept, options):
        return [gradients[0], 10 * gradients[1]]

    operation = Operation(
        name(), forward, outputs=("y",), fake=fake, backward=backward, differentiable=("b",), passed={"a": "y"},
        finish=finish,
    )  # fmt: skip
    for call in ways(operation).values():
        a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        call(a, b).sum().backward()
        assert a.grad.tolist() == [1, 1, 1]
        assert b.grad.tolist() == [20, 20, 20]


def test_parameters_are_grouped_and_what_backward_does_not_read_is_not_kept():
    def forward(x: Tensor, parameters: GatedParameters, offset: int) -> Tensor:
        assert isinstance(parameters, GatedParameters)
        return x * parameters.weight + parameters.response_weight + offset

    def fake(x: Tensor, parameters: GatedParameters, offset: int) -> Tensor:
        return torch.empty_like(x)

    def backward(d_y: Tensor, parameters: GatedParameters, x: Tensor, wanted: list[bool]):
        seen["parameters"] = parameters
        return [d_y * x, None, d_y, None, None, None, None]

    operation = Operation(
        name(), forward, outputs=("y",), fake=fake, backward=backward, differentiable=("parameters",),
        unread=("weight", "bias"),
    )  # fmt: skip
    x, weight, response = torch.randn(3), torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    seven = (weight, torch.ones(3), response, None, torch.ones(3), None, None)
    y = operation(x, *seven, 1)
    with torch.no_grad():
        weight.mul_(2)  # is not kept, so this is allowed
    y.sum().backward()
    assert seen["parameters"].weight is seen["parameters"].bias is None
    assert torch.equal(weight.grad, x)
    assert response.grad.tolist() == [1, 1, 1]


def test_without_backward_an_operation_is_its_own_transpose_and_differentiable_again():
    def scaled(x: Tensor, scale: Tensor, factor: float) -> Tensor:
        return x * scale * factor

    def fake(x: Tensor, scale: Tensor, factor: float) -> Tensor:
        return torch.empty_like(x)

    operation = Operation(name(), scaled, outputs=("y",), fake=fake)
    x, scale = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x_: operation(x_, scale, 3.0), x)
    assert torch.autograd.gradgradcheck(lambda x_: operation(x_, scale, 3.0).pow(3), x)


def test_an_inconsistent_operation_is_refused_at_its_declaration():
    def takes_options_first(option: int, a: Tensor) -> Tensor:
        return a

    def misspelt(d_yy: Tensor, a: Tensor, wanted: list[bool]):
        return [d_yy]

    def without_wanted(d_y: Tensor, a: Tensor):
        return [d_y]

    with pytest.raises(TypeError, match="tensors first"):
        Operation(name(), takes_options_first, outputs=("y",), fake=takes_options_first)
    with pytest.raises(TypeError, match="d_yy"):
        weighted_operation(backward=misspelt, kept_if={})
    with pytest.raises(TypeError, match="takes a,"):
        weighted_operation(backward=without_wanted, kept_if={})
    with pytest.raises(KeyError, match="typo"):
        weighted_operation(kept_if={"typo": "twice"})


def test_a_backward_that_returns_too_few_gradients_is_an_error():
    def one(d_y: Tensor, a: Tensor, wanted: list[bool]):
        return [d_y]

    y, _ = weighted_operation(backward=one, kept_if={})(torch.randn(3, requires_grad=True), torch.randn(3), True)
    with pytest.raises(ValueError, match="shorter"):
        y.sum().backward()
