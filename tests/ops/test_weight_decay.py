from functools import partial

import pytest
import torch
from numerics import relative_error
from penalised_weights import one_example_at_a_time, operands

from stn_fast.ops.weight_decay import weight_decay_penalty


@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (6, 3, 2, 2)])
def test_closed_form_equals_every_examples_own_weights(shape):
    tensors = operands(shape)
    got, want = weight_decay_penalty(*tensors), one_example_at_a_time(*tensors)
    assert relative_error(got, want) < 1e-14
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors), strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("inner", [(5,), (3, 2, 2)])
def test_factors_have_the_penalty_and_the_gradients_of_their_product(inner, groups):
    weight, _, weight_gate, h, decay = operands((6, *inner))
    ones = [1] * (len(inner) - 1)
    a, b = torch.randn(6, 2, *ones).double(), torch.randn(2 * groups, *inner).double()
    tensors = [weight, a.requires_grad_(), b.requires_grad_(), weight_gate, h, decay]
    got = weight_decay_penalty(weight, a, weight_gate, h, decay, b, groups)
    of_group = [x.flatten(1) @ y.flatten(1) for x, y in zip(a.chunk(groups), b.chunk(groups), strict=True)]
    want = one_example_at_a_time(weight, torch.cat(of_group).view(weight.shape), weight_gate, h, decay)
    assert relative_error(got, want) < 1e-14
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors), strict=True):
        assert relative_error(one, other) < 1e-12


def factors(groups, shape=(6, 2, 2, 2)):
    """Arguments up to the projection, for a response of rank 2."""
    weight, _, weight_gate, h, decay = operands(shape)
    a, b = (torch.randn(sizes).double() for sizes in ((6, 2, 1, 1), (2 * groups, *shape[1:])))
    return [weight, a.requires_grad_(), weight_gate, h, decay, b.requires_grad_()]


@pytest.mark.parametrize("groups", [1, 2])
def test_the_penalty_of_factors_has_second_derivatives(groups):
    assert torch.autograd.gradgradcheck(partial(weight_decay_penalty, groups=groups), factors(groups))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (1, 2, 3, 0)])
def test_gradients_of_factors_are_stored_like_the_weight(order):
    """Else adding them to its other gradients would copy them: channels_last, and a transposed weight."""
    tensors = factors(1, (6, 3, 2, 2) if order[0] == 0 else (6, 8, 1, 1))
    want = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    back = [order.index(dim) for dim in range(4)]
    weight = tensors[0].detach().permute(order).contiguous().permute(back)
    if order[0] != 0:
        weight, tensors[1], tensors[5] = (t.detach().flatten(1) for t in (weight, tensors[1], tensors[5]))
    tensors = [weight.requires_grad_(), *(t.detach().requires_grad_() for t in tensors[1:])]
    got = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    assert got[0].stride() == weight.stride()
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other.view(one.shape)) < 1e-14


def test_autocast_changes_nothing_of_the_penalty_of_factors():
    def gradients(on):
        tensors = [tensor.detach().float().requires_grad_() for tensor in given]
        with autocast(on):
            return torch.autograd.grad(weight_decay_penalty(*tensors), tensors)

    given = factors(1)
    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_factors_that_do_not_fit_are_refused():
    weight, _, weight_gate, h, decay = operands((6, 4))
    with pytest.raises(ValueError, match=r"response_projection \(4, 4\)"):
        weight_decay_penalty(weight, torch.randn(6, 2).double(), weight_gate, h, decay, torch.randn(4, 4).double())


def test_follows_torchs_convention_where_the_response_is_zero():
    """SGD with weight_decay adds decay · W to the gradient; so must the penalty."""
    weight, response_weight, weight_gate, h, decay = operands()
    penalty = weight_decay_penalty(
        weight, response_weight, weight_gate, torch.zeros_like(h), torch.full_like(decay, 0.3)
    )
    assert relative_error(torch.autograd.grad(penalty, weight)[0], 0.3 * weight) < 1e-14


def test_one_shared_row_is_that_row_for_all():
    weight, response_weight, weight_gate, h, decay = operands()
    shared = weight_decay_penalty(weight, response_weight, weight_gate, h[0], decay)
    rows = weight_decay_penalty(weight, response_weight, weight_gate, h[:1].expand(4, -1), decay)
    assert relative_error(shared, rows) < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_layers_have_a_float32_penalty(dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in operands()]
    tensors[4] = tensors[4].detach().float()
    penalty = weight_decay_penalty(*tensors)
    assert penalty.dtype == torch.float32
    assert relative_error(penalty, one_example_at_a_time(*(t.double() for t in tensors))) < 1e-6
    assert torch.autograd.grad(penalty, tensors[0])[0].dtype == dtype


def test_wrong_arguments_are_named_in_the_error():
    weight, response_weight, weight_gate, h, decay = operands()
    with pytest.raises(ValueError, match=r"decay \(B,\), got .*\(4, 3\), \(3,\)"):
        weight_decay_penalty(weight, response_weight, weight_gate, h, decay[:3])
    with pytest.raises(ValueError, match="empty batch"):
        weight_decay_penalty(weight, response_weight, weight_gate, h[:0], decay[:0])


def float32(batch=32):
    return [t.detach().float().requires_grad_() for t in operands((64, 64), batch, 5)]


def autocast(on=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_autocast_around_either_pass_changes_nothing(forward, backward):
    tensors = float32()
    want = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    with autocast(forward):
        penalty = weight_decay_penalty(*tensors)
    assert torch.equal(penalty, weight_decay_penalty(*tensors))
    with autocast(backward):
        got = torch.autograd.grad(penalty, tensors)
    assert all(map(torch.equal, got, want))


def test_autocast_changes_nothing_of_the_second_derivative():
    def second(on):
        tensors = float32()
        with autocast(on):
            first = torch.autograd.grad(weight_decay_penalty(*tensors), tensors, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    assert all(map(torch.equal, second(True), second(False)))
    tensors = [t.detach()[:2, ..., :2].contiguous().requires_grad_() for t in operands()[:4]]
    tensors.append(torch.rand(2, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradgradcheck(weight_decay_penalty, tensors)


def test_autocast_changes_nothing_of_transforms_and_compiled_passes():
    weight, *others = (t.detach() for t in float32())
    for make in (
        lambda f: torch.func.grad(f),
        lambda f: lambda w: torch.func.jvp(f, (w,), (torch.ones_like(w),))[1],
        lambda f: lambda w: torch.func.vmap(torch.func.grad(f))(torch.stack([w, 2 * w])),
    ):
        run = make(lambda w: weight_decay_penalty(w, *others))
        want = run(weight)
        with autocast():
            got = run(weight)
        assert relative_error(got, want) < 1e-6
    leaf = weight.clone().requires_grad_()
    compiled = torch.compile(lambda w: weight_decay_penalty(w, *others), fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(weight_decay_penalty(leaf, *others), leaf)
    with autocast():
        (got,) = torch.autograd.grad(compiled(leaf), leaf)
    assert relative_error(got, want) < 1e-6


def test_a_factor_that_depends_on_the_weight_has_the_same_gradient_where_it_is_differentiated_again():
    weight, _, weight_gate, h, decay = operands((6, 4))
    projection = torch.randn(2, 4).double()
    penalty = weight_decay_penalty(weight, 1.5 * weight[:, :2], weight_gate, h, decay, projection)
    (plain,) = torch.autograd.grad(penalty, weight, retain_graph=True)
    (again,) = torch.autograd.grad(penalty, weight, create_graph=True)
    assert relative_error(again, plain) < 1e-14


def test_gradients_of_factors_can_be_batched():
    tensors = factors(2)
    single = torch.autograd.grad(weight_decay_penalty(*tensors, groups=2), tensors)
    scales = torch.tensor([1.0, -2.0], dtype=torch.double)
    got = torch.autograd.grad(weight_decay_penalty(*tensors, groups=2), tensors, scales, is_grads_batched=True)
    for one, both in zip(single, got, strict=True):
        assert relative_error(both, torch.stack([one, -2 * one])) < 1e-14
