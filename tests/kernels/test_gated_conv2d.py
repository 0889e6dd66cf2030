"""Gated convolution kernels, every way to compute them, against plain torch in float64."""

import contextlib
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_conv2d as kernels
from stn_fast.kernels import gated_conv2d_implicit as implicit
from stn_fast.kernels import matmul
from stn_fast.kernels.autotune import Autotuner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
BOOLS = [False, True]
# batch, outputs, groups, height, width: rows of every length, part-filled tiles, sums that several programs share
IMAGES = [
    (2, 6, 3, 5, 7),
    (1, 70, 1, 3, 3),
    (3, 64, 2, 4, 4),
    (2, 3, 1, 33, 41),
    (5, 9, 9, 1, 13),
    (1, 1, 1, 37, 1),
    (3, 20, 1, 1, 1),
]
# batch, channels, outputs, height, width, kernel, stride, padding, dilation
CONVOLUTIONS = [
    (2, 16, 32, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 5, 7, 9, 8, (3, 2), (2, 1), (0, 2), (1, 2)),
    (1, 37, 33, 5, 11, (1, 1), (2, 2), (0, 0), (1, 1)),
    (2, 3, 8, 11, 5, (5, 5), (1, 2), (2, 4), (2, 1)),
    (5, 18, 3, 2, 2, (2, 2), (1, 1), (0, 0), (1, 1)),
]
CONFIGS = {
    implicit.config_name(config): config
    for config in [
        *matmul.HOPPER_CONFIGS,
        *matmul.AMPERE_CONFIGS,
        *matmul.UNALIGNED_CONFIGS,
        *matmul.FLOAT32_CONFIGS,
        *implicit.TF32_HOPPER_CONFIGS,
        *implicit.TF32_AMPERE_CONFIGS,
    ]
}


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would be compared with float32 on the CPU."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def drawn(*shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def per_group(both, groups):
    """P and Q (B, O, H, W) of the joined branches."""
    halves = both.unflatten(1, (groups, 2, -1))
    return halves[:, :, 0].flatten(1, 2), halves[:, :, 1].flatten(1, 2)


def plain_epilogue(both, scale, shift, groups, relu, dtype):
    p, q = (half.to(dtype) for half in per_group(both, groups))
    y = p + scale.to(dtype)[:, :, None, None] * q
    y = y if shift is None else y + shift.to(dtype)[:, :, None, None]
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", BOOLS, ids=["linear", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_epilogue_obeys_the_2x_rule(image, layout, dtype, relu):
    batch, outputs, groups, height, width = image
    both, scale, shift = drawn((batch, 2 * outputs, height, width), *[(batch, outputs)] * 2, dtype=dtype)
    both = both.contiguous(memory_format=layout)
    for offset, wide in itertools.product((shift, None), BOOLS):
        tables = (scale.float(), None if offset is None else offset.float()) if wide else (scale, offset)
        y = kernels.epilogue_forward(*on_device(both, *tables), groups, relu)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=layout)
        plain, exact = (plain_epilogue(both, scale, offset, groups, relu, d) for d in (dtype, torch.float64))
        assert_twice_as_good(y, plain, exact)


def test_what_is_not_a_number_passes_the_epilogue_and_its_relu():
    both = torch.ones(1, 4, 2, 2)
    both[0, 0, 0, 0] = both[0, 3, 1, 1] = float("nan")
    tables = torch.ones(1, 2), torch.ones(1, 2)
    y = kernels.epilogue_forward(*on_device(both, *tables), 1, True).cpu()
    assert y.isnan().sum() == 2
    assert y[0, 0, 0, 0].isnan()
    assert y[0, 1, 1, 1].isnan()


def plain_gradients(dy, y, both, scale, groups, relu, dtype):
    """(d_both, d_scale, d_shift) by torch's own rules, through an epilogue whose ReLU is decided by y."""
    leaves = [t.to(dtype).requires_grad_() for t in (both, scale, torch.zeros_like(scale))]
    before_relu = plain_epilogue(*leaves, groups, False, dtype)
    passed = (dy * (y > 0) if relu else dy).to(dtype)
    return torch.autograd.grad(before_relu, leaves, passed)


def assert_gradients(image, layout, dtype, relu, wanted, dense_q=False):
    batch, outputs, groups, height, width = image
    shape = (batch, outputs, height, width)
    both, scale, dy, y = drawn((batch, 2 * outputs, height, width), (batch, outputs), shape, shape, dtype=dtype)
    both, dy, y = (t.to(DEVICE).contiguous(memory_format=layout) for t in (both, dy, y.relu()))
    q = both.unflatten(1, (groups, 2, -1))[:, :, 1]
    if dense_q:
        q = q.flatten(1, 2).contiguous(memory_format=layout).unflatten(1, (groups, -1))
    given_q = q if wanted[1] else q.new_empty(0)
    got = kernels.epilogue_backward(dy, y if relu else None, given_q, scale.float().to(DEVICE), groups, relu, *wanted)
    given = [t.cpu() for t in (dy, y, both)]
    plain, exact = (plain_gradients(*given, scale, groups, relu, d) for d in (dtype, torch.float64))
    for name, wants, gradient, *references in zip(("both", "scale", "shift"), wanted, got, plain, exact, strict=True):
        assert (gradient is not None) == wants, name
        if gradient is not None:
            assert gradient.dtype == (dtype if name == "both" else torch.float32)
            assert_twice_as_good(gradient, *references, name=name)
    if got[0] is not None and q[0].numel() > height * width:  # one channel alone lies alike in both formats
        assert got[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("relu", BOOLS, ids=["linear", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_gradients_of_the_epilogue_obey_the_2x_rule(image, layout, dtype, relu):
    assert_gradients(image, layout, dtype, relu, (True, True, True))


@pytest.mark.parametrize("relu", BOOLS, ids=["linear", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("wanted", list(itertools.product(BOOLS, repeat=3))[1:], ids=str)
def test_only_wanted_gradients_of_the_epilogue_are_computed_and_right(wanted, layout, relu):
    assert_gradients((2, 6, 3, 5, 7), layout, torch.float32, relu, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_the_response_may_lie_alone_or_beside_the_plain_branch(layout):
    for image in ((2, 6, 3, 5, 7), (2, 5, 1, 4, 6), (2, 1, 1, 4, 6)):
        assert_gradients(image, layout, torch.float32, True, (True, True, True), dense_q=True)


def test_gradients_of_other_memory_formats_than_the_response_s_are_right():
    both, scale, dy = drawn((2, 12, 5, 7), (2, 6), (2, 6, 5, 7), dtype=torch.float32)
    q = both.to(DEVICE).contiguous(memory_format=torch.channels_last).unflatten(1, (1, 2, 6))[:, :, 1]
    for given in (dy, torch.ones(()).expand(2, 6, 5, 7)):
        got = kernels.epilogue_backward(*on_device(given), None, q, *on_device(scale), 1, False, True, True, True)
        exact = plain_gradients(given, None, both, scale, 1, False, torch.float64)
        plain = plain_gradients(given, None, both, scale, 1, False, torch.float32)
        for three in zip(got, plain, exact, strict=True):
            assert_twice_as_good(*three)


def test_a_batch_too_small_to_fill_a_device_shares_its_pixels_among_programs_and_repeats_bit_for_bit():
    image, layout = (1, 3, 1, 64, 65), torch.channels_last
    assert_gradients(image, layout, torch.float32, False, (True, True, True))
    both, scale, dy = drawn((1, 6, 64, 65), (1, 3), (1, 3, 64, 65), dtype=torch.float32)
    q = both.to(DEVICE).contiguous(memory_format=layout).unflatten(1, (1, 2, 3))[:, :, 1]
    operands = (*on_device(dy), None, q, *on_device(scale), 1, False, False, True, True)
    first, again = (kernels.epilogue_backward(*operands)[1:] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def operands(convolution, dtype):
    batch, channels, outputs, height, width, kernel, *_ = convolution
    filters = (outputs, channels, *kernel)
    x, weight, response, scale, shift = drawn(
        (batch, channels, height, width), filters, filters, *[(batch, outputs)] * 2, dtype=dtype
    )
    return x.contiguous(memory_format=torch.channels_last), weight, response, scale, shift


def plain_convolution(tensors, moves, relu, dtype):
    x, weight, response, scale, shift = (None if t is None else t.to(dtype) for t in tensors)
    stride, padding, dilation = moves
    q = F.conv2d(x, response, None, stride, padding, dilation)
    y = F.conv2d(x, weight, None, stride, padding, dilation) + scale[:, :, None, None] * q
    y = y if shift is None else y + shift[:, :, None, None]
    return (y.relu() if relu else y), q


def assert_implicit(convolution, dtype, config, relu=True, save_response=True, has_shift=True):
    tensors, moves = list(operands(convolution, dtype)), convolution[6:]
    tensors[4] = tensors[4] if has_shift else None
    y, q = implicit.implicit_gemm(*on_device(*tensors), *moves, relu, save_response, config)
    plain, exact = (plain_convolution(tensors, moves, relu, d) for d in (dtype, torch.float64))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_twice_as_good(y, plain[0], exact[0])
    assert (q is not None) == save_response
    if q is not None:
        assert_twice_as_good(q.flatten(1, 2), plain[1], exact[1], "q")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_implicit_product_obeys_the_2x_rule(convolution, dtype):
    assert_implicit(convolution, dtype, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_of_the_implicit_product_obeys_the_2x_rule(config, dtype):
    """Sizes that leave every tile part-filled; on a GPU, the configurations that ship for it."""
    config = CONFIGS[config]
    if DEVICE == "cuda":
        capability = torch.cuda.get_device_capability()
        if not any(config in implicit.conv_configs(dtype, aligned, capability, "ieee") for aligned in BOOLS):
            pytest.skip("not shipped for this dtype and device")
    assert_implicit((3, 80, 144, 7, 7, (2, 1), (1, 1), (1, 0), (1, 1)), dtype, config)


def test_implicit_product_without_relu_shift_or_response_is_right():
    for relu, save_response, has_shift in itertools.product(BOOLS, repeat=3):
        assert_implicit(CONVOLUTIONS[1], torch.float32, None, relu, save_response, has_shift)


def test_implicit_product_takes_contiguous_images_and_filters():
    tensors, moves = operands(CONVOLUTIONS[0], torch.float32), CONVOLUTIONS[0][6:]
    x, *rest = on_device(*tensors)
    want, _ = implicit.implicit_gemm(x, *rest, *moves, False, False)
    got, _ = implicit.implicit_gemm(x.contiguous(), *rest, *moves, False, False)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_the_response_lies_as_half_of_a_joined_convolution_whichever_way_it_was_computed():
    """A compiled graph counts on its strides."""
    x, weight, response, scale, shift = operands(CONVOLUTIONS[0], torch.float32)
    both = F.conv2d(x, torch.cat([weight, response]), padding=1).contiguous(memory_format=torch.channels_last)
    want = both.unflatten(1, (1, 2, -1))[:, :, 1]
    moves = CONVOLUTIONS[0][6:]
    _, got = implicit.implicit_gemm(*on_device(x, weight, response, scale, shift), *moves, False, True)
    assert (got.shape, got.stride()) == (want.shape, want.stride())
    dy = torch.randn(2, 32, 6, 7, generator=torch.Generator().manual_seed(1))
    mixed = (dy.to(DEVICE), None, got, scale.to(DEVICE), 1, False, True, True, True)
    gradients = kernels.epilogue_backward(*mixed)
    plain, exact = (plain_gradients(dy, None, both.to(d), scale, 1, False, d) for d in (torch.float32, torch.float64))
    for three in zip(gradients, plain, exact, strict=True):
        assert_twice_as_good(*three)


class Wanted(NamedTuple):
    bias: bool = True
    response_bias: bool = True
    weight_gate: bool = True
    bias_gate: bool = True
    h: bool = True


def plain_gates(bias, response_bias, weight_gate, bias_gate, h):
    return h @ weight_gate.T, bias + (h @ bias_gate.T) * response_bias


def plain_gates_backward(leaves, d_scale, d_shift, dtype):
    """Gradients of b, r, Gw, Gb, h by autograd, from tables in parts."""
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return torch.autograd.grad(plain_gates(*leaves), leaves, [d.to(dtype).sum(0) for d in (d_scale, d_shift)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "outputs", "n", "parts"), [(3, 5, 3, 1), (70, 40, 17, 3), (1, 1, 1, 2), (33, 70, 32, 1)]
)
def test_gates_and_their_gradients_obey_the_2x_rule(batch, outputs, n, parts, dtype):
    leaves = drawn((outputs,), (outputs,), (outputs, n), (outputs, n), (batch, n), dtype=dtype)
    _, response_bias, weight_gate, bias_gate, h = leaves
    got = kernels.gates(*on_device(*leaves))
    wide, exact = (plain_gates(*(leaf.to(d) for leaf in leaves)) for d in (torch.float32, torch.float64))
    for name, *three in zip(("scale", "shift"), got, wide, exact, strict=True):
        assert three[0].dtype == torch.float32
        assert_twice_as_good(*three, name)
    tables = drawn((parts, batch, outputs), (parts, batch, outputs), dtype=torch.float32, seed=1)
    operands = on_device(*tables, response_bias, weight_gate, bias_gate, h)
    got = kernels.gates_backward(*operands, Wanted())
    plain = [g.to(dtype) for g in plain_gates_backward(leaves, *tables, torch.float32)]
    for name, *three in zip(
        Wanted._fields, got, plain, plain_gates_backward(leaves, *tables, torch.float64), strict=True
    ):
        assert three[0].dtype == dtype
        assert_twice_as_good(*three, name)
    only_h = kernels.gates_backward(*operands, Wanted(False, False, False, False, True))
    assert only_h[:4] == (None,) * 4
    assert torch.equal(only_h[4], got[4])
    without_h = kernels.gates_backward(None, *operands[1:], Wanted(True, False, False, True, False))
    assert without_h[2] is without_h[4] is None
    assert torch.equal(without_h[0], got[0])
    assert torch.equal(without_h[3], got[3])


class Clock:
    """Takes one way for the fastest, and keeps the names of all that it was shown."""

    def __init__(self, fastest):
        self.fastest, self.shown = fastest, []

    def __call__(self, candidate):
        name = candidate.args[-1]
        self.shown.append(name)
        return 1.0 if name == self.fastest else 2.0


def chosen(monkeypatch, tmp_path, tensors, moves, clock, groups=1):
    """What choose_forward computes, and whether the library did."""
    called = []

    def library():
        called.append(True)
        return torch.zeros(1), None

    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "tuner", Autotuner(clock, tmp_path / "autotune.json"))
    result = kernels.choose_forward(*on_device(*tensors), *moves, groups, True, False, library)
    return result, bool(called)


def test_the_fastest_way_forward_is_taken_and_remembered(monkeypatch, tmp_path):
    tensors, moves = operands(CONVOLUTIONS[0], torch.float32), CONVOLUTIONS[0][6:]
    names = [kernels.LIBRARY, *map(implicit.config_name, matmul.FLOAT32_CONFIGS)]
    clock = Clock(names[-1])
    (y, _), _ = chosen(monkeypatch, tmp_path, tensors, moves, clock)
    assert clock.shown == names
    plain, exact = (plain_convolution(tensors, moves, True, d)[0] for d in (torch.float32, torch.float64))
    assert_twice_as_good(y, plain, exact)
    _, by_library = chosen(monkeypatch, tmp_path, tensors, moves, Clock(kernels.LIBRARY))
    assert not by_library  # remembered in the file


def test_candidates_are_timed_and_run_on_the_device_of_the_images(monkeypatch, tmp_path):
    inside = []

    @contextlib.contextmanager
    def guard(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    def timer(candidate):
        timed.append(inside[0].shape)
        return 1.0

    tensors, moves = operands(CONVOLUTIONS[0], torch.float32), CONVOLUTIONS[0][6:]
    monkeypatch.setattr(kernels, "device_guard", guard)
    timed = []
    chosen(monkeypatch, tmp_path, tensors, moves, timer)
    assert set(timed) == {tensors[0].shape}
    assert not inside


def test_the_library_takes_what_is_fastest_there(monkeypatch, tmp_path):
    tensors, moves = operands(CONVOLUTIONS[0], torch.float32), CONVOLUTIONS[0][6:]
    assert chosen(monkeypatch, tmp_path, tensors, moves, Clock(kernels.LIBRARY))[1]


@pytest.mark.parametrize("why", ["contiguous", "groups", "few channels"])
def test_problems_that_are_not_the_implicit_product_s_are_the_library_s_unasked(monkeypatch, tmp_path, why):
    convolution = CONVOLUTIONS[3] if why == "few channels" else CONVOLUTIONS[0]
    x, *rest = operands(convolution, torch.float32)
    x = x.contiguous() if why == "contiguous" else x
    clock = Clock(kernels.LIBRARY)
    groups = 2 if why == "groups" else 1
    assert chosen(monkeypatch, tmp_path, (x, *rest), convolution[6:], clock, groups)[1]
    assert clock.shown == []


def test_nothing_is_timed_without_a_device(monkeypatch, tmp_path):
    if DEVICE == "cuda":
        pytest.skip("there is one")
    tensors, moves = operands(CONVOLUTIONS[0], torch.float32), CONVOLUTIONS[0][6:]
    assert chosen(monkeypatch, tmp_path, tensors, moves, None)[1]


def test_tf32_is_used_where_the_library_s_convolutions_use_it():
    assert implicit.precision(torch.float32) == "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert [implicit.precision(dtype) for dtype in DTYPES] == ["tf32", "ieee", "ieee"]


def test_float64_is_refused():
    both, scale, dy = drawn((1, 4, 3, 3), (1, 2), (1, 2, 3, 3), dtype=torch.float64)
    with pytest.raises(TypeError, match="both is float64"):
        kernels.epilogue_forward(*on_device(both, scale), None, 1, False)
    with pytest.raises(TypeError, match="dy is float64"):
        kernels.epilogue_backward(
            *on_device(dy), None, both.unflatten(1, (1, 2, 2))[:, :, 1], *on_device(scale), 1, False, True, True, True
        )
    tensors = on_device(*operands(CONVOLUTIONS[0], torch.float64))
    with pytest.raises(TypeError, match="x is float64"):
        implicit.implicit_gemm(*tensors, *CONVOLUTIONS[0][6:], False, False)


def test_memory_that_is_neither_contiguous_nor_channels_last_is_refused():
    both, scale, dy = drawn((3, 4, 3, 5), (3, 2), (3, 2, 3, 5), dtype=torch.float32)
    with pytest.raises(ValueError, match="both must be contiguous or channels_last"):
        kernels.epilogue_forward(*on_device(both.transpose(2, 3), scale), None, 1, False)
    q = both.to(DEVICE).transpose(2, 3).unflatten(1, (1, 2, 2))[:, :, 1]
    with pytest.raises(ValueError, match="q must be a view"):
        kernels.epilogue_backward(
            *on_device(dy.transpose(2, 3)), None, q, *on_device(scale), 1, False, True, True, True
        )
