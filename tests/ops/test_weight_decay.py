import pytest
import torch
from numerics import assert_twice_as_good, relative_error

from stn_fast.dispatch import use_backend
from stn_fast.ops.weight_decay import weight_decay_penalty


def operands(shape=(6, 5), batch=4, n=3):
    torch.manual_seed(0)
    drawn = torch.randn(*shape), torch.randn(*shape), torch.randn(shape[0], n), torch.randn(batch, n), torch.rand(batch)
    return [t.double().requires_grad_() for t in drawn]


def one_example_at_a_time(weight, response_weight, weight_gate, h, decay):
    """½ · mean of decay · ‖W_eff‖², every example's weights built in full."""
    gates = (h @ weight_gate.T).view(len(h), -1, *[1] * (weight.ndim - 1))
    effective = weight + gates * response_weight
    return 0.5 * (decay * effective.flatten(1).square().sum(1)).mean()


@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (6, 3, 2, 2)])
def test_closed_form_equals_every_examples_own_weights(shape):
    tensors = operands(shape)
    got, want = weight_decay_penalty(*tensors), one_example_at_a_time(*tensors)
    assert relative_error(got, want) < 1e-14
    for one, other in zip(torch.autograd.grad(got, tensors), torch.autograd.grad(want, tensors), strict=True):
        assert relative_error(one, other) < 1e-12


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


def test_misfits_are_named():
    weight, response_weight, weight_gate, h, decay = operands()
    with pytest.raises(ValueError, match=r"decay \(B,\); got .*\(4, 3\), \(3,\)"):
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


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_kernels(tensors):
    """The penalty and its gradients to W, R and Gw, h and decay being constants."""
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in tensors[:3]]
    with use_backend("triton"):
        penalty = weight_decay_penalty(*leaves, *(t.detach().to(DEVICE) for t in tensors[3:]))
        return [penalty, *torch.autograd.grad(penalty, leaves)]


def defined(tensors, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors[:3]]
    penalty = one_example_at_a_time(*leaves, *(t.detach().to(dtype) for t in tensors[3:]))
    return [penalty, *torch.autograd.grad(penalty, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "batch", "n"),
    [((6, 5), 4, 3), ((1, 1), 1, 1), ((3, 7, 3, 3), 70, 17), ((5, 1100), 33, 32), ((2, 0), 2, 2)],
)
def test_kernels_obey_the_2x_rule(shape, batch, n, dtype):
    tensors = [t.detach().to(dtype) for t in operands(shape, batch, n)]
    tensors[4] = tensors[4].float()
    names = ("penalty", "dW", "dR", "dGw")
    with use_backend("reference"):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        penalty = weight_decay_penalty(*leaves, *tensors[3:])
        plain = [penalty, *torch.autograd.grad(penalty, leaves)]
    for name, got, in_dtype, exact in zip(
        names, by_kernels(tensors), plain, defined(tensors, torch.float64), strict=True
    ):
        assert got.dtype == in_dtype.dtype
        assert_twice_as_good(got, in_dtype, exact, name)


def test_kernels_compute_only_the_gradients_that_are_asked_for():
    tensors = [t.detach().float().to(DEVICE) for t in operands()]
    want = by_kernels(tensors)[1:]
    for k in range(3):
        tensors[k].requires_grad_()
        with use_backend("triton"):
            (got,) = torch.autograd.grad(weight_decay_penalty(*tensors), tensors[k])
        assert torch.equal(got, want[k])
        tensors[k] = tensors[k].detach()


def test_kernels_have_the_second_derivative_of_plain_torch():
    def second(backend):
        tensors = [t.detach().float().to(DEVICE) for t in operands()]
        leaves = [t.requires_grad_() for t in tensors[:3]]
        with use_backend(backend):
            first = torch.autograd.grad(weight_decay_penalty(*tensors), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        assert relative_error(got, want) < 1e-6


def test_gradients_to_h_and_decay_are_plain_torch_s_on_every_backend():
    tensors = [t.detach().float().to(DEVICE).requires_grad_() for t in operands()]
    with use_backend("triton"):
        got = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    want = torch.autograd.grad(weight_decay_penalty(*tensors), tensors)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
