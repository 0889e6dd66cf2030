import itertools

import pytest
import torch
import torch.nn.functional as F
from flops import flops_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error, taking_tensors

from stn_fast.dispatch import use_backend
from stn_fast.ops import gated_conv2d as operation
from stn_fast.ops import gates
from stn_fast.ops.gated_conv2d import cpu, gated_conv2d

reference, fold = taking_tensors(operation.reference), taking_tensors(gates.fold)
NAMES = ("x", "weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate", "h")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Drawn alike at every run: a sum of few numbers may cancel to less than its rounding, and pass or fail by chance.
property_test = settings(
    derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def layout(request):
    return request.param


@pytest.fixture(params=["at once", "by blocks"])
def way(request, monkeypatch):
    """Both ways of the CPU, which sizes fit for tests would not reach, with and without a change of layout."""
    if request.param == "by blocks":
        monkeypatch.setattr(cpu, "_AT_ONCE", 0)
        monkeypatch.setattr(cpu, "_BLOCK", 1)
        monkeypatch.setattr(cpu, "_LEAST_1X1", 2)
    return request.param


def operands(
    batch=3, inputs=4, outputs=6, size=(7, 5), kernel=(3, 3), n=3, *, groups=1, bias=True,
    dtype=torch.float32, device="cpu", layout=torch.contiguous_format, seed=0,
):  # fmt: skip
    """The tensors that gated_conv2d takes, drawn in float64 so that every dtype rounds the same."""
    generator = torch.Generator().manual_seed(seed)
    filters = (outputs, inputs // groups, *kernel)
    shapes = (
        (batch, inputs, *size), filters, (outputs,), filters, (outputs,), (outputs, n), (outputs, n), (batch, n),
    )  # fmt: skip
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    drawn[0] = drawn[0].contiguous(memory_format=layout)
    if not bias:
        drawn[2] = drawn[4] = drawn[6] = None
    return drawn


def leaves(tensors, dtype=None, wanted=(True,) * 8):
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(bool(w))
        for t, w in zip(tensors, wanted, strict=True)
    ]


def gradients(function, tensors, dy, **options):
    asked = [t for t in tensors if t is not None and t.requires_grad]
    return torch.autograd.grad(function(*tensors, **options), asked, dy.to(asked[0].dtype))


def assert_as_good_as_plain_torch(tensors, wanted=(True,) * 8, **options):
    """Output and every wanted gradient, by the 2x rule."""
    exact, plain, ours = (leaves(tensors, d, wanted) for d in (torch.float64, None, None))
    exact_y, y = reference(*exact, **options), gated_conv2d(*ours, **options)
    assert y.is_contiguous(memory_format=torch.channels_last if _is_last(tensors[0]) else torch.contiguous_format)
    assert_twice_as_good(y, reference(*plain, **options), exact_y)
    if not any(t is not None and t.requires_grad for t in ours):
        return
    dy = torch.randn(exact_y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dy = dy.to(exact_y.device, tensors[0].dtype)
    for name, *three in zip(
        [n for n, t in zip(NAMES, ours, strict=True) if t is not None and t.requires_grad],
        gradients(gated_conv2d, ours, dy, **options),
        gradients(reference, plain, dy, **options),
        gradients(reference, exact, dy.double(), **options),
        strict=True,
    ):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)


def _is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


GEOMETRIES = {
    "3x3": dict(padding=1),
    "unpadded": dict(),
    "strided": dict(stride=2, padding=1),
    "uneven": dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "dilated": dict(dilation=2, padding=2),
    "same": dict(padding="same"),
    "same, dilated": dict(padding="same", dilation=(1, 2)),
    "valid": dict(padding="valid"),
    "relu": dict(padding=1, relu=True),
    "groups": dict(groups=2, padding=1),
    "groups, strided, relu": dict(groups=2, stride=2, relu=True),
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@use_backend("cpp")
def test_core_obeys_the_2x_rule_in_every_geometry_and_layout(options, large, layout, way):
    size = (19, 17) if large else (7, 9)  # the large ones pass to the library pixel by pixel
    tensors = operands(5, size=size, groups=options.get("groups", 1), layout=layout)
    assert_as_good_as_plain_torch(tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [dict(padding=1), dict(groups=2, relu=True)], ids=str)
def test_every_backend_and_dtype_obeys_the_2x_rule(backend, dtype, bias, options, layout):
    tensors = operands(
        groups=options.get("groups", 1), bias=bias, dtype=dtype, device=backend, layout=layout, outputs=10
    )
    assert_as_good_as_plain_torch(tensors, **options)


@property_test
@given(
    batch=st.integers(1, 9), inputs=st.integers(1, 19), outputs=st.integers(1, 23), size=st.integers(1, 20),
    kernel=st.integers(1, 5), groups=st.integers(1, 3), n=st.integers(1, 17), bias=st.booleans(), relu=st.booleans(),
    last=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@use_backend("cpp")
def test_core_is_as_exact_as_plain_torch_at_any_size(
    batch, inputs, outputs, size, kernel, groups, n, bias, relu, last, seed
):
    tensors = operands(
        batch, inputs * groups, outputs * groups, (size, size + 1), (kernel, kernel), n, groups=groups, bias=bias,
        layout=torch.channels_last if last else torch.contiguous_format, seed=seed,
    )  # fmt: skip
    assert_as_good_as_plain_torch(tensors, padding=kernel // 2, groups=groups, relu=relu)


@pytest.mark.parametrize("size", [(1, 1), (40, 41)])
@pytest.mark.parametrize("outputs", [1, 257, 300])
@use_backend("cpp")
def test_core_is_right_across_its_tiles(size, outputs, layout, way):
    """One pixel, runs of more than 1024 pixels, one channel, more channels than a task takes."""
    assert_as_good_as_plain_torch(operands(3, 2, outputs, size, (1, 1), layout=layout), relu=True)


def test_sizes_decide_between_blocks_and_one_go():
    """A wide image goes by blocks and pixel by pixel, filters larger than their images in one go as they are."""
    options = cpu.Geometry([1, 1], [1, 1], [1, 1], 1, False)
    wide = cpu.plan(torch.empty(128, 64, 32, 32), torch.empty(64, 64, 3, 3), options)
    deep = cpu.plan(torch.empty(128, 512, 4, 4), torch.empty(512, 512, 3, 3), options)
    assert wide.joined
    assert wide.converts
    assert sum(b.stop - b.start for b in wide.blocks()) == 128
    assert not deep.joined
    assert not deep.converts


def test_float64_is_exact(device, layout):
    tensors = operands(dtype=torch.float64, device=device, layout=layout)
    assert relative_error(gated_conv2d(*tensors, padding=1), reference(*tensors, padding=1)) < 1e-14


@pytest.mark.parametrize("options", [dict(bias=True), dict(bias=False), dict(groups=2)], ids=str)
def test_every_gradient_of_the_reference_matches_finite_differences(options):
    tensors = leaves(operands(2, size=(4, 3), n=2, dtype=torch.float64, **options))
    given_ones = [t for t in tensors if t is not None]

    def of_given(*values):
        left = iter(values)
        arguments = [None if t is None else next(left) for t in tensors]
        return reference(*arguments, padding=1, stride=2, groups=options.get("groups", 1))

    assert torch.autograd.gradcheck(of_given, given_ones)


@pytest.mark.parametrize("chunk", range(8))
def test_every_subset_of_wanted_gradients_is_right(chunk, way):
    """All 256 subsets of needs_input_grad, in eight parts: what is computed never depends on what else is wanted."""
    tensors = operands(4, size=(5, 4))
    for wanted in list(itertools.product([False, True], repeat=8))[chunk::8]:
        assert_as_good_as_plain_torch(tensors, wanted, padding=1, relu=True)


def test_subsets_on_every_backend(backend, layout):
    tensors = operands(device=backend, layout=layout, groups=2)
    for wanted in [
        (0, 1, 1, 1, 1, 1, 1, 0),
        (1, 0, 0, 0, 0, 0, 0, 1),
        (0, 0, 0, 1, 0, 0, 0, 0),
        (1, 1, 0, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 0, 0, 1),
        (0, 0, 1, 0, 1, 0, 1, 0),
    ]:
        assert_as_good_as_plain_torch(tensors, wanted, padding=1, groups=2)


@pytest.mark.parametrize("wanted", [("x", "h"), NAMES[1:-1], ("h",), ("bias", "bias_gate")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_wanted_convolutions_run(wanted, dtype, way):
    """A validation step makes no weight gradient, a first layer's training step no data gradient."""
    tensors = operands(4, 8, 16, (9, 9), dtype=dtype)
    y = gated_conv2d(*leaves(tensors, wanted=[name in wanted for name in NAMES]), padding=1)
    counted = flops_of(lambda: y.sum().backward())
    convolution = 2 * 2 * 4 * 81 * 16 * 8 * 9
    convolutions = ("x" in wanted) + ("weight" in wanted)
    gates = 2 * 4 * 16 * 3 * 6
    assert convolutions * convolution <= counted <= convolutions * convolution + gates


@pytest.mark.parametrize("empty", ["batch", "hyperparameters"])
def test_empty_sizes_give_empty_or_zero_results(backend, empty):
    tensors = leaves(operands(**({"batch": 0} if empty == "batch" else {"n": 0}), device=backend))
    y = gated_conv2d(*tensors, padding=1)
    grads = torch.autograd.grad(y.sum(), tensors)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, tensors, strict=True))
    assert relative_error(y, reference(*tensors, padding=1)) < 1e-6
    assert y.shape == (tensors[0].shape[0], 6, 7, 5)


def test_non_contiguous_inputs_and_gradients(backend, way):
    tensors = operands(device=backend)
    want = gated_conv2d(*tensors, padding=1)
    ones = torch.ones((), device=backend).expand_as(want)
    wanted = gradients(gated_conv2d, leaves(tensors), ones, padding=1)
    twisted = [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t for t in tensors]
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors]
    for other in (twisted, strided):
        assert relative_error(gated_conv2d(*other, padding=1), want) < 1e-6
        for got, wish in zip(gradients(gated_conv2d, leaves(other), ones, padding=1), wanted, strict=True):
            assert relative_error(got, wish) < 1e-6
    mixed = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    dy = torch.randn_like(want)
    for got, wish in zip(
        gradients(gated_conv2d, leaves([tensors[0], *mixed[1:]]), dy, padding=1),
        gradients(gated_conv2d, leaves(tensors), dy, padding=1),
        strict=True,
    ):
        assert relative_error(got, wish) < 1e-6


@pytest.mark.parametrize("size", [(7, 5), (19, 17)])
def test_torch_s_default_dtype_and_device_don_t_change_what_the_core_writes(size, layout, way):
    """Its memory is float32 on the CPU: narrower numbers would be written over their end."""
    tensors = operands(size=size, layout=layout)
    dy = torch.randn_like(reference(*tensors, padding=1))

    def everything():
        return [gated_conv2d(*tensors, padding=1), *gradients(gated_conv2d, leaves(tensors), dy, padding=1)]

    want = everything()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            results.append(everything())
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        results.append(everything())
    for result in results:
        assert all(torch.equal(got, wish) for got, wish in zip(result, want, strict=True))


def test_the_layout_of_the_result_is_that_of_torch(layout):
    tensors = operands(3, 4, 6, (19, 18), layout=layout)
    like = F.conv2d(tensors[0], tensors[1], padding=1)
    y = gated_conv2d(*tensors, padding=1)
    assert y.stride() == like.stride()
    (dx,) = gradients(gated_conv2d, leaves(tensors, wanted=[1] + [0] * 7), torch.ones_like(y), padding=1)
    assert dx.stride() == tensors[0].stride()


def test_nan_is_not_rectified_away(backend, layout, way):
    tensors = operands(device=backend, layout=layout)
    tensors[0][1, 2, 3, 3] = float("nan")
    y = gated_conv2d(*tensors, padding=1, relu=True)
    assert torch.equal(y.isnan(), reference(*tensors, padding=1, relu=True).isnan())
    assert y.isnan().sum() == 9 * 6
    bias = [tensor.clone().requires_grad_(i == 2) for i, tensor in enumerate(tensors)]
    got, want = (
        torch.autograd.grad((z := f(*bias, padding=1, relu=True)), bias[2], torch.ones_like(z))[0]
        for f in (gated_conv2d, reference)
    )
    assert torch.equal(got, want)  # counts of where y > 0 or is NaN


@pytest.mark.parametrize("size", [(7, 5), (40, 40)])
@use_backend("cpp")
def test_gate_gradients_do_not_depend_on_the_number_of_threads(size, layout, way):
    tensors, before = operands(9, 3, 20, size, layout=layout), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = gated_conv2d(*(ours := leaves(tensors)), padding=1)
            # Only what the core computes itself: the library's own sums may depend on its threads.
            results.append(torch.autograd.grad(y, [ours[i] for i in (2, 4, 6)], torch.ones_like(y)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@pytest.mark.parametrize("relu", [False, True])
def test_folding_gives_the_plain_layer_at_one_shared_h(relu):
    x, *parameters, h = operands(dtype=torch.float64)
    shared = gated_conv2d(x, *parameters, h[0], padding=1, relu=relu)
    assert relative_error(shared, reference(x, *parameters, h[:1].expand(3, -1), padding=1, relu=relu)) < 1e-14
    weight, bias = fold(*parameters, h[0])
    plain = F.conv2d(x, weight, bias, padding=1)
    assert relative_error(plain.relu() if relu else plain, shared) < 1e-14


def test_folded_layer_carries_gradients_to_h():
    x, *parameters, h = operands(dtype=torch.float64)
    shared, rows = h[0].clone().requires_grad_(), h[:1].clone().requires_grad_()
    folded = torch.autograd.grad(gated_conv2d(x, *parameters, shared).square().sum(), shared)[0]
    full = torch.autograd.grad(gated_conv2d(x, *parameters, rows.expand(3, -1)).square().sum(), rows)[0]
    assert relative_error(folded, full[0]) < 1e-12


def test_forward_mode_tangent_is_not_silently_zero(device):
    primals = operands(dtype=torch.float64, device=device)
    tangents = [torch.randn_like(t) for t in primals]
    _, got = torch.func.jvp(gated_conv2d, tuple(primals), tuple(tangents))
    step = 1e-6
    ahead = gated_conv2d(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    behind = gated_conv2d(*(p - step * t for p, t in zip(primals, tangents, strict=True)))
    assert relative_error(got, (ahead - behind) / (2 * step)) < 1e-7


def test_dual_numbers_carry_the_tangent_too():
    from torch.autograd import forward_ad

    *before, h = operands()
    direction = torch.randn_like(h)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(gated_conv2d(*before, forward_ad.make_dual(h, direction), relu=True)).tangent
    want = torch.func.jvp(lambda h_: reference(*before, h_, relu=True), (h,), (direction,))[1]
    assert relative_error(tangent, want) < 1e-6


def test_tangent_carries_gradients():
    """Delta-STN differentiates the tangent itself with respect to the gates."""
    *before, gate, bias_gate, h = operands(dtype=torch.float64)
    gate.requires_grad_()
    grads = []
    for function in (gated_conv2d, reference):
        _, tangent = torch.func.jvp(
            lambda h_, f=function: f(*before, gate, bias_gate, h_), (torch.zeros_like(h),), (torch.ones_like(h),)
        )
        grads.append(torch.autograd.grad(tangent.square().sum(), gate)[0])
    assert relative_error(*grads) < 1e-12


def test_second_derivatives_in_reverse_mode_raise_instead_of_lying():
    tensors = leaves(operands())
    y = gated_conv2d(*tensors)
    first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first[0].sum(), tensors[1], allow_unused=True)


@pytest.mark.parametrize("options", [dict(), dict(groups=2), dict(relu=True)], ids=str)
def test_registration_is_complete(backend, layout, way, options):
    groups, relu = options.get("groups", 1), options.get("relu", False)
    args = leaves(operands(size=(17, 16), device=backend, layout=layout, groups=groups))
    args[1], args[3] = (t.detach().contiguous(memory_format=layout).requires_grad_() for t in (args[1], args[3]))
    geometry = ([2, 1], [1, 1], [1, 1], groups, relu)
    torch.library.opcheck(torch.ops.stn_fast.gated_conv2d.default, (*args, *geometry, True))
    x, weight, _, *rest = (t.detach() for t in args)
    y, q = torch.ops.stn_fast.gated_conv2d(*(t.detach() for t in args), *geometry, True)
    kept = (x, weight, None, *rest, y if relu else None, q)
    torch.library.opcheck(
        torch.ops.stn_fast.gated_conv2d_backward.default,
        (torch.randn_like(y), *kept, *geometry, [True] * 8),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("options", [dict(padding="same"), dict(stride=2, relu=True)], ids=str)
def test_compiles_without_graph_break_to_the_same_numbers(options, layout):
    tensors = leaves(operands(size=(18, 17), layout=layout))
    compiled = torch.compile(lambda *t: gated_conv2d(*t, **options), fullgraph=True, backend="aot_eager")
    y = gated_conv2d(*tensors, **options)
    dy = torch.randn_like(y)
    assert torch.equal(compiled(*tensors), y)
    for got, want in zip(
        torch.autograd.grad(compiled(*tensors), tensors, dy),
        gradients(gated_conv2d, tensors, dy, **options),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype):
    tensors = leaves(operands())
    with torch.autocast("cpu", dtype=dtype):
        y = gated_conv2d(*tensors)
    plain = reference(*(t.to(dtype) for t in tensors))
    assert y.dtype == dtype
    assert_twice_as_good(y, plain, reference(*leaves(tensors, torch.float64)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), tensors))


def test_autocast_around_a_backward_pass_alone_changes_nothing(layout, way):
    """The core is given addresses: a product in 16 bits would be misread."""
    tensors = leaves(operands(layout=layout))
    y = gated_conv2d(*tensors, padding=1)
    dy = torch.randn_like(y)
    want = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, tensors, dy)
    assert all(map(torch.equal, got, want))


def test_autocast_leaves_float64_alone_as_torch_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated_conv2d(*operands(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("relu", [False, True])
def test_memory_kept_for_backward_is_the_response_alone(relu, way):
    """q = conv(x, R), and nothing where no gate's gradient is wanted; ReLU keeps its result, which is there anyway."""
    saved = []
    tensors = operands(8, 4, 16, (8, 8))
    activation = 8 * 16 * 64
    rest = sum(t.numel() for t in tensors) - 16 + relu * activation  # bias itself is not needed
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        gated_conv2d(*leaves(tensors), padding=1, relu=relu)
        everything = sum(saved)
        saved.clear()
        gated_conv2d(*leaves(tensors, wanted=[name == "x" for name in NAMES]), padding=1, relu=relu)
    assert everything == rest + activation
    assert sum(saved) == rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(3, 5, 7, 5)), r"x must be \(3, 4, 7, 5\).*got \(3, 5, 7, 5\)"),
        (dict(x=torch.randn(4, 7, 5)), r"wants x \(B, I, H, W\).*got x \(4, 7, 5\)"),
        (dict(x=torch.randn(3, 4, 2, 5)), r"x \(3, 4, 2, 5\) with padding=\[0, 0\] is smaller than the filters"),
        (dict(response_weight=torch.randn(6, 4, 3, 1)), r"response_weight must be \(6, 4, 3, 3\)"),
        (dict(weight_gate=torch.randn(6, 2)), r"weight_gate must be \(6, 3\)"),
        (dict(bias_gate=torch.randn(5, 3)), r"bias_gate must be \(6, 3\)"),
        (dict(bias=torch.randn(1)), r"bias must be \(6,\)"),
        (dict(h=torch.randn(5, 3)), r"h must be \(3, 3\).*got \(5, 3\)"),
        (dict(h=torch.randn(3, 3, dtype=torch.float64)), r"h is torch.float64.*weight torch.float32"),
        (dict(x=torch.ones(3, 4, 7, 5, dtype=torch.uint8)), r"x is torch.uint8"),
        (dict(response_bias=None), r"together, or none"),
        (dict(groups=4), r"groups=4 must be at least 1 and divide the 6 output channels"),
        (dict(groups=2), r"x must be \(3, 8, 7, 5\) to fit.*groups=2"),
        (dict(stride=0), r"stride as an int or a pair of them, at least 1; got 0"),
        (dict(padding=-1), r"padding as an int or a pair of them, at least 0; got -1"),
        (dict(padding="full"), r"padding as numbers, 'same' or 'valid'; got 'full'"),
        (dict(padding="same", stride=2), r"padding='same' wants stride 1"),
        (dict(dilation=(1, 2, 3)), r"dilation as an int or a pair of them.*got \(1, 2, 3\)"),
    ],
)
def test_misfits_are_named(change, message):
    arguments = dict(zip(NAMES, operands(), strict=True)) | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_conv2d(**arguments)
