import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good

import stn_fast
from stn_fast.dispatch import use_backend
from stn_fast.ops import linear as module
from stn_fast.ops import products
from stn_fast.ops.linear import linear

pytestmark = pytest.mark.skipif(not products.offers_onednn(), reason="no oneDNN in torch")
sizes = st.sampled_from([1, 2, 3, 5, 16, 17, 67, 129])


@pytest.fixture(autouse=True)
def _onednn(monkeypatch):
    monkeypatch.setattr(products, "library", lambda: "oneDNN")
    monkeypatch.setattr(module, "SMALL", 1)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """What oneDNN's product has been called with."""
    seen, theirs = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: seen.append(given) or theirs(*given))
    return seen


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    shape=st.lists(sizes, min_size=1, max_size=2),
    inputs=sizes,
    outputs=sizes,
    has_bias=st.booleans(),
    contiguous=st.booleans(),
    expanded=st.booleans(),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
def test_values_and_only_the_needed_gradients_are_computed(
    shape, inputs, outputs, has_bias, contiguous, expanded, wanted, seed
):
    x, weight = drawn(*shape, inputs, seed=seed), drawn(outputs, inputs, seed=seed + 10)
    bias = drawn(outputs, seed=seed + 20) if has_bias else None
    if not contiguous:
        x, weight = x.transpose(0, -1).contiguous().transpose(0, -1), weight.T.contiguous().T
        bias = None if bias is None else torch.stack([bias, -bias], dim=1)[:, 0]
    if expanded:
        x, bias = drawn(1, seed=seed).expand(*shape, inputs), None if bias is None else bias[:1].expand(outputs)
    dy = drawn(*shape, outputs, seed=seed + 30)
    results = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)):
        leaves = [None if t is None else t.detach().to(dtype) for t in (x, weight, bias)]
        asked = [t.requires_grad_() for t, wants in zip(leaves, wanted, strict=True) if wants and t is not None]
        y = function(*leaves)
        assert y.requires_grad == bool(asked)
        results.append([y.detach(), *(torch.autograd.grad(y, asked, dy.to(dtype)) if asked else ())])
    for number, (ours, plain, exact) in enumerate(zip(*results, strict=True)):
        assert_twice_as_good(ours, plain, exact, name=f"result {number}")


def test_onednn_computes_float32_products_on_the_cpu(calls, monkeypatch):
    x, weight = drawn(2, 3, 4), drawn(5, 4).requires_grad_()
    linear(x, weight)
    with torch.no_grad():
        linear(x, weight)
    assert len(calls) == 2
    for tensors in [(x.double(), weight.double()), (x[:0], weight), (x.to("meta"), weight.to("meta"))]:
        assert linear(*tensors).shape == (*tensors[0].shape[:-1], 5)
    linear(x[0].to_sparse(), weight.detach())
    with use_backend("reference"):
        linear(x, weight)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    linear(x, weight)
    assert len(calls) == 2


def test_small_products_are_left_to_torch(calls, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 3 * 4 * 5 + 1)
    linear(drawn(3, 4), drawn(5, 4))
    assert calls == []
    linear(drawn(4, 4), drawn(5, 4))
    assert len(calls) == 1


def test_a_folded_layer_uses_the_faster_product(calls):
    layer = stn_fast.HyperLinear(4, 5, num_hyperparameters=2)
    layer(drawn(3, 4), torch.zeros(2))
    assert len(calls) == 1


def test_the_input_of_frozen_weights_may_change_in_place():
    x, weight = drawn(6, 4).requires_grad_(), drawn(5, 4, seed=1)
    hidden = x * 1
    y = linear(hidden, weight)
    hidden.relu_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(6, 4))


def test_weights_may_change_in_place_if_the_input_needs_no_gradient():
    x, weight = drawn(6, 4), drawn(5, 4, seed=1).requires_grad_()
    y = linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


def test_a_gradient_that_is_one_number_expanded():
    x, weight, bias = (t.requires_grad_() for t in (drawn(6, 4), drawn(5, 4, seed=1), drawn(5, seed=2)))
    ours = torch.autograd.grad(linear(x, weight, bias).sum(), [x, weight, bias])
    plain = torch.autograd.grad(F.linear(x, weight, bias).sum(), [x, weight, bias])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    x, weight = drawn(6, 4).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()

    def twice(function):
        (dx,) = torch.autograd.grad(function(x, weight).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, weight])

    for ours, plain in zip(twice(linear), twice(F.linear), strict=True):
        torch.testing.assert_close(ours, plain)


def test_transforms_compilers_and_autocast_see_torch():
    x, weight, bias = drawn(6, 4), drawn(5, 4, seed=1), drawn(5, seed=2)
    _, tangent = torch.func.jvp(lambda w: linear(x, w, bias), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent, x.sum(1, keepdim=True).expand(6, 5))
    each = torch.vmap(lambda row: linear(row, weight, bias))(x)
    torch.testing.assert_close(each, F.linear(x, weight, bias))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "shapes", [[(6, 4), (3, 5)], [(6, 4), (5, 3, 4)], [(6, 4), ()], [(), (5, 4)], [(6, 4), (5, 4), (4,)]]
)
def test_mismatched_shapes_raise_the_error_of_torch(shapes):
    given = [drawn(*shape) for shape in shapes]
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*given)
    with pytest.raises(RuntimeError) as ours:
        linear(*given)
    assert str(ours.value) == str(theirs.value)


def test_a_bias_expanded_from_one_number_is_added_to_all_outputs():
    x, weight, bias = drawn(6, 4), drawn(5, 4), drawn(1)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
