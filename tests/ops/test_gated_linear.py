import itertools

import pytest
import torch
from flops import flops_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error, taking_tensors

from stn_fast.dispatch import use_backend
from stn_fast.ops import gated_linear as operation
from stn_fast.ops import gates, products
from stn_fast.ops.gated_linear import cpu, gated_linear

reference, fold = taking_tensors(operation.reference), taking_tensors(gates.fold)
NAMES = ("x", "weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate", "h")
sizes = st.integers(1, 70)
# Drawn alike at every run: a sum of one number may cancel to less than its rounding, and pass or fail by chance.
property_test = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def operands(batch, inputs, outputs, n, *, outer=1, inner=1, bias=True, dtype=torch.float32, device="cpu", seed=0):
    """x (outer, batch, inner, I) and the other operands, drawn in float64 so that every dtype rounds the same."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (outer, batch, inner, inputs), (outputs, inputs), (outputs,), (outputs, inputs), (outputs,),
        (outputs, n), (outputs, n), (batch, n),
    )  # fmt: skip
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    if not bias:
        drawn[2] = drawn[4] = drawn[6] = None
    return drawn


def apply(function, tensors):
    """`function` is gated_linear or reference; both on x (outer, batch, inner, I)."""
    if function is gated_linear:
        return gated_linear(*tensors, example_dim=1)
    x, *rest = tensors
    outer, _, inner, inputs = x.shape
    y = reference(x.reshape(x.shape[:-1].numel(), inputs), *rest, outer, inner)
    return y.view(*x.shape[:-1], y.shape[-1])


def leaves(tensors, dtype=None, wanted=(True,) * 8):
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(w)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def gradients(function, tensors, dy):
    asked = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(apply(function, tensors), asked, dy.to(asked[0].dtype))


def assert_as_good_as_plain_torch(tensors, wanted=(True,) * 8):
    """Output and every wanted gradient, by the 2x rule."""
    exact, plain, ours = (leaves(tensors, d, wanted) for d in (torch.float64, None, None))
    exact_y = apply(reference, exact)
    assert_twice_as_good(apply(gated_linear, ours), apply(reference, plain), exact_y)
    if not any(t is not None and t.requires_grad for t in ours):
        return
    dy = torch.randn(exact_y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dy = dy.to(exact_y.device)
    for name, *three in zip(
        [n for n, t in zip(NAMES, ours, strict=True) if t is not None and t.requires_grad],
        gradients(gated_linear, ours, dy.to(tensors[0].dtype)),
        gradients(reference, plain, dy.to(tensors[0].dtype)),
        gradients(reference, exact, dy.to(tensors[0].dtype).double()),
        strict=True,
    ):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)


@property_test
@given(batch=sizes, inputs=sizes, outputs=sizes, n=st.integers(1, 17), bias=st.booleans(), seed=st.integers(0, 9))
@use_backend("cpp")
def test_core_is_as_exact_as_plain_torch_one_position_an_example(batch, inputs, outputs, n, bias, seed):
    assert_as_good_as_plain_torch(operands(batch, inputs, outputs, n, bias=bias, seed=seed))


@property_test
@given(
    batch=st.integers(1, 9), outer=st.integers(1, 6), inner=st.integers(1, 7), outputs=sizes, n=st.integers(1, 5),
    bias=st.booleans(),
)  # fmt: skip
@use_backend("cpp")
def test_core_is_as_exact_as_plain_torch_many_positions_an_example(batch, outer, inner, outputs, n, bias):
    assert_as_good_as_plain_torch(operands(batch, 11, outputs, n, outer=outer, inner=inner, bias=bias))


@pytest.mark.parametrize("shape", [(300, 65, 130, 15), (130, 7, 1030, 40), (1025, 3, 5, 2)])
@use_backend("cpp")
def test_core_is_right_across_its_tiles_and_chunks(shape):
    assert_as_good_as_plain_torch(operands(*shape))


@pytest.mark.parametrize("block", [1, 300, 5000])
@pytest.mark.parametrize("layout", [dict(), dict(outer=3), dict(inner=3), dict(outer=2, inner=5)], ids=str)
@use_backend("cpp")
def test_core_is_right_however_the_rows_fall_into_blocks(monkeypatch, block, layout):
    """Blocks of one example, of part of a turn through the batch and of several turns, adding up across blocks."""
    monkeypatch.setattr(cpu, "_BLOCK", block)
    monkeypatch.setattr(cpu, "row_blocks", counted := _Counted(cpu.row_blocks))
    assert_as_good_as_plain_torch(operands(37, 2, 6, 3, **layout))
    assert max(counted.blocks) > 1 or block >= 300


class _Counted:
    """A generator function that notes how many items each call gave."""

    def __init__(self, function):
        self.function, self.blocks = function, []

    def __call__(self, *arguments):
        items = list(self.function(*arguments))
        self.blocks.append(len(items))
        return iter(items)


@pytest.mark.parametrize(
    ("outer", "batch", "inner", "most"), [(1, 37, 1, 5), (6, 4, 1, 9), (2, 5, 3, 7), (3, 2, 9, 4), (4, 3, 2, 100)]
)
def test_blocks_cover_every_row_once_and_name_its_example(outer, batch, inner, most):
    covered = []
    for rows, examples, turns in cpu.row_blocks(outer, batch, inner, most):
        expected = [b for _ in range(turns) for b in range(examples.start, examples.stop) for _ in range(inner)]
        assert [m // inner % batch for m in range(rows.start, rows.stop)] == expected
        covered += range(rows.start, rows.stop)
    assert covered == list(range(outer * batch * inner))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [dict(), dict(outer=3, inner=2)], ids=["rows", "positions"])
def test_every_backend_and_dtype_obeys_the_2x_rule(backend, dtype, bias, layout):
    assert_as_good_as_plain_torch(operands(17, 19, 23, 3, bias=bias, dtype=dtype, device=backend, **layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [dict(), dict(outer=3, inner=2)], ids=["rows", "positions"])
def test_more_hyperparameters_than_a_kernel_holds_obey_the_2x_rule(device, dtype, bias, layout):
    assert_as_good_as_plain_torch(operands(6, 17, 23, 33, bias=bias, dtype=dtype, device=device, **layout))


def test_triton_refuses_more_hyperparameters_than_a_kernel_holds():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"at most 32 hyperparameters, and h has 33"):
        apply(gated_linear, operands(6, 17, 23, 33, device=device))


def test_float64_is_exact(device):
    tensors = operands(5, 7, 6, 3, outer=2, inner=3, dtype=torch.float64, device=device)
    assert relative_error(apply(gated_linear, tensors), apply(reference, tensors)) < 1e-14


@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_of_the_reference_matches_finite_differences(bias):
    tensors = leaves(operands(3, 4, 5, 2, outer=2, inner=2, bias=bias, dtype=torch.float64))
    given_ones = [t for t in tensors if t is not None]

    def of_given(*values):
        left = iter(values)
        return apply(reference, [None if t is None else next(left) for t in tensors])

    assert torch.autograd.gradcheck(of_given, given_ones)


@pytest.mark.parametrize("chunk", range(8))
def test_every_subset_of_wanted_gradients_is_right(chunk):
    """All 256 subsets of needs_input_grad, in eight parts: what is computed never depends on what else is wanted."""
    tensors = operands(9, 5, 7, 3, outer=2)
    for wanted in list(itertools.product([False, True], repeat=8))[chunk::8]:
        assert_as_good_as_plain_torch(tensors, wanted)


def test_subsets_on_every_backend(backend):
    tensors = operands(6, 5, 7, 3, device=backend)
    for wanted in [
        (0, 1, 1, 1, 1, 1, 1, 0),
        (1, 0, 0, 0, 0, 0, 0, 1),
        (0, 0, 0, 0, 0, 0, 0, 1),
        (0, 0, 1, 0, 1, 0, 1, 0),
    ]:
        assert_as_good_as_plain_torch(tensors, tuple(map(bool, wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_validation_step_computes_no_weight_gradient(dtype, monkeypatch):
    """Frozen parameters: only the products behind dx may run, and small ones with the gates."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")  # the other's are not counted
    batch, inputs, outputs = 32, 48, 40
    tensors = operands(batch, inputs, outputs, 3, dtype=dtype)
    wanted = [name in ("x", "h") for name in NAMES]
    y = apply(gated_linear, leaves(tensors, wanted=wanted))
    large = 2 * batch * outputs * 2 * inputs
    assert large <= flops_of(y.sum().backward) <= large + 2 * batch * outputs * 4 * 3


@pytest.mark.parametrize("empty", ["batch", "positions", "inputs", "outputs"])
def test_empty_sizes_give_empty_or_zero_results(backend, empty):
    sizes_ = dict(batch=3, inputs=4, outputs=5, n=2, outer=2)
    sizes_["outer" if empty == "positions" else empty] = 0
    tensors = leaves(operands(**sizes_, device=backend))
    y = apply(gated_linear, tensors)
    grads = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == (sizes_["outer"], sizes_["batch"], 1, sizes_["outputs"])
    assert all(g.isfinite().all() for g in grads)
    assert relative_error(y, apply(reference, tensors)) == 0


def test_non_contiguous_inputs_and_gradients(backend):
    tensors = operands(6, 5, 7, 3, device=backend)
    twisted = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for t in tensors]
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors]
    want = apply(gated_linear, tensors)
    for other in (twisted, strided):
        other = leaves(other)
        assert relative_error(apply(gated_linear, other), want) < 1e-6
        expanded = torch.ones((), device=backend).expand_as(want)
        for got, wish in zip(
            gradients(gated_linear, other, expanded), gradients(gated_linear, leaves(tensors), expanded), strict=True
        ):
            assert relative_error(got, wish) < 1e-6


@pytest.mark.parametrize("example_dim", [0, 1, 2, -2])
def test_a_row_of_h_applies_to_all_positions_of_its_example(example_dim):
    x = torch.randn(3, 4, 5, 6)
    batch = x.shape[example_dim]
    _, *rest = operands(batch, 6, 7, 2)
    got = gated_linear(x, *rest, example_dim=example_dim)
    *shared, h = rest
    for b in range(batch):
        one = gated_linear(
            x.select(example_dim, b), *shared, h[b : b + 1].expand(x.select(example_dim, b).shape[0], -1)
        )
        assert relative_error(got.select(example_dim, b), one) < 1e-6


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    tensors, before = operands(700, 33, 130, 7), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = apply(gated_linear, ours := leaves(tensors))
            # Only what the core computes itself: the library's own products may depend on its threads.
            results.append([y, *(torch.autograd.grad(y, [ours[i] for i in (2, 4, 6)], torch.ones_like(y)))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other[1:], results[0][1:], strict=True):
            assert torch.equal(got, want)


def test_folding_gives_the_plain_layer_at_one_shared_h():
    x, *rest = operands(9, 5, 7, 3, dtype=torch.float64)
    *parameters, h = rest
    shared = gated_linear(x, *parameters, h[0], example_dim=1)
    assert relative_error(shared, gated_linear(x, *parameters, h[:1].expand(9, -1), example_dim=1)) < 1e-14
    weight, bias = fold(*parameters, h[0])
    assert relative_error(torch.nn.functional.linear(x, weight, bias), shared) < 1e-14


def test_folded_layer_carries_gradients_to_h():
    x, *parameters, h = operands(9, 5, 7, 3, dtype=torch.float64)
    shared = h[0].clone().requires_grad_()
    rows = h[:1].clone().requires_grad_()
    folded = torch.autograd.grad(gated_linear(x, *parameters, shared, example_dim=1).square().sum(), shared)[0]
    full = torch.autograd.grad(gated_linear(x, *parameters, rows.expand(9, -1), example_dim=1).square().sum(), rows)[0]
    assert relative_error(folded, full[0]) < 1e-12


def test_forward_mode_tangent_is_not_silently_zero(device):
    primals = [t[0, :, 0] if t.ndim == 4 else t for t in operands(5, 7, 6, 3, dtype=torch.float64, device=device)]
    tangents = [torch.randn_like(t) for t in primals]
    _, got = torch.func.jvp(gated_linear, tuple(primals), tuple(tangents))
    step = 1e-6
    ahead = gated_linear(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    behind = gated_linear(*(p - step * t for p, t in zip(primals, tangents, strict=True)))
    assert relative_error(got, (ahead - behind) / (2 * step)) < 1e-7


def test_forward_mode_is_right_with_dual_tensors_too():
    from torch.autograd import forward_ad

    x, *parameters, h = (t[0, :, 0] if t.ndim == 4 else t for t in operands(5, 7, 6, 3))
    direction = torch.randn_like(h)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gated_linear(x, *parameters, forward_ad.make_dual(h, direction))).tangent
    want = torch.func.jvp(lambda h_: reference(x, *parameters, h_), (h,), (direction,))[1]
    assert relative_error(tangent, want) < 1e-6


def test_tangent_carries_gradients():
    """Delta-STN differentiates the tangent itself with respect to the gates."""
    tensors = [t[0, :, 0] if t.ndim == 4 else t for t in operands(5, 7, 6, 3, dtype=torch.float64)]
    *before, gate, bias_gate, h = tensors
    gate.requires_grad_()
    grads = []
    for function in (gated_linear, reference):
        _, tangent = torch.func.jvp(
            lambda h_, f=function: f(*before, gate, bias_gate, h_), (torch.zeros_like(h),), (torch.ones_like(h),)
        )
        grads.append(torch.autograd.grad(tangent.square().sum(), gate)[0])
    assert relative_error(*grads) < 1e-12


def test_works_under_grad_and_vmap_of_torch_func():
    x, *parameters, h = (t[0, :, 0] if t.ndim == 4 else t for t in operands(5, 7, 6, 3, dtype=torch.float64))
    grad = torch.func.grad(lambda h_: gated_linear(x, *parameters, h_).square().sum())(h)
    want = torch.autograd.grad(reference(x, *parameters, leaf := h.clone().requires_grad_()).square().sum(), leaf)[0]
    assert relative_error(grad, want) < 1e-12
    many = torch.vmap(lambda x_: gated_linear(x_, *parameters, h))(torch.stack([x, 2 * x]))
    assert relative_error(many[1], gated_linear(2 * x, *parameters, h)) < 1e-12


@pytest.mark.parametrize("loss", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["linear", "quadratic"])
def test_second_derivatives_in_reverse_mode_raise_instead_of_lying(loss):
    tensors = leaves(operands(3, 4, 5, 2))
    first = torch.autograd.grad(loss(apply(gated_linear, tensors)), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first[0].sum(), tensors[1], allow_unused=True)


def test_registration_is_complete(backend):
    x, *rest = operands(4, 5, 6, 3, device=backend)
    args = leaves([x.reshape(-1, 5), *rest])
    torch.library.opcheck(torch.ops.stn_fast.gated_linear.default, (*args, 1, 1, True))
    dy, q = torch.randn(4, 6, device=backend), torch.randn(4, 6, device=backend)
    x, weight, _, *rest = (t.detach() for t in args)
    torch.library.opcheck(
        torch.ops.stn_fast.gated_linear_backward.default,
        (dy, x, weight, None, *rest, q, 1, 1, [True] * 8),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_graph_break_to_the_same_numbers():
    tensors = leaves(operands(6, 5, 7, 3))
    compiled = torch.compile(lambda *t: gated_linear(*t, example_dim=1), fullgraph=True, backend="aot_eager")
    dy = torch.randn(1, 6, 1, 7)
    assert torch.equal(compiled(*tensors), apply(gated_linear, tensors))
    for got, want in zip(
        torch.autograd.grad(compiled(*tensors), tensors, dy), gradients(gated_linear, tensors, dy), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype):
    tensors = leaves(operands(6, 5, 7, 3))
    with torch.autocast("cpu", dtype=dtype):
        y = apply(gated_linear, tensors)
        plain = apply(reference, tensors)
    assert y.dtype == dtype
    assert_twice_as_good(y, plain, apply(reference, leaves(tensors, torch.float64)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), tensors))


def test_autocast_leaves_float64_alone_as_torch_does():
    tensors = operands(6, 5, 7, 3, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apply(gated_linear, tensors).dtype == torch.float64


def test_memory_kept_for_backward_is_one_activation():
    """q = x Rᵀ is all that is stored beside the inputs, and nothing where no gate's gradient is wanted."""
    saved = []
    tensors = operands(64, 16, 32, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        apply(gated_linear, leaves(tensors))
        everything = sum(saved)
        saved.clear()
        apply(gated_linear, leaves(tensors, wanted=[name == "x" for name in NAMES]))
    operands_ = sum(t.numel() for t in tensors) - 32  # bias itself is not needed
    assert everything == operands_ + 64 * 32
    assert sum(saved) == operands_


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4, 6)), r"x must be \(4, 5\).*got \(4, 6\)"),
        (dict(response_weight=torch.randn(7, 4)), r"response_weight must be \(7, 5\).*got \(7, 4\)"),
        (dict(weight_gate=torch.randn(7, 2)), r"weight_gate must be \(7, 3\)"),
        (dict(bias_gate=torch.randn(6, 3)), r"bias_gate must be \(7, 3\)"),
        (dict(bias=torch.randn(1)), r"bias must be \(7,\)"),
        (dict(h=torch.randn(5, 3)), r"h must be \(4, 3\).*got \(5, 3\)"),
        (dict(h=torch.randn(4, 1, 3)), r"h \(B, n\) or \(n,\)"),
        (dict(h=torch.randn(4, 3, dtype=torch.float64)), r"h is torch.float64.*weight torch.float32"),
        (dict(x=torch.ones(4, 5, dtype=torch.int64)), r"x is torch.int64"),
        (dict(weight=torch.randn(7, 5, device="meta")), r"on cpu.*weight torch.float32 on meta"),
        (dict(response_bias=None), r"together, or none"),
        (dict(example_dim=1), r"example_dim=1 must name a dimension of x"),
        (dict(example_dim=5), r"example_dim=5 must name a dimension of x"),
    ],
)
def test_misfits_are_named(change, message):
    x, *rest = operands(4, 5, 7, 3)
    arguments = dict(zip(NAMES, [x[0, :, 0], *rest], strict=True)) | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_linear(**arguments)
