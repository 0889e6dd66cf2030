"""What only a GPU shows of gated convolutions: real layers, large images, the autotuner's own clock."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_twice_as_good

from stn_fast.functional import gated_conv2d
from stn_fast.kernels import autotune
from stn_fast.kernels import gated_conv2d as kernels
from stn_fast.kernels import gated_conv2d_implicit as implicit
from stn_fast.kernels.autotune import Autotuner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
DEVICE = "cuda"
HYPERPARAMETERS = 15
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# batch, channels, outputs, side, kernel, stride: AlexNet's on CIFAR-10, ResNet-18's, the Fashion-MNIST network's
LAYERS = [
    (128, 3, 64, 32, 3, 2),
    (128, 64, 192, 8, 3, 1),
    (128, 384, 256, 4, 3, 1),
    (128, 64, 64, 32, 3, 1),
    (128, 128, 256, 16, 3, 2),
    (128, 256, 512, 8, 1, 2),
    (128, 16, 32, 14, 5, 1),
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "tuner", Autotuner())


@pytest.fixture
def float32_precision():
    """Sets how convolutions multiply float32, for one test."""
    before = torch.backends.cudnn.conv.fp32_precision

    def set_precision(precision):
        torch.backends.cudnn.conv.fp32_precision = precision

    yield set_precision
    set_precision(before)


def drawn(*shapes, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]


def operands(layer, dtype, layout=torch.channels_last):
    """x, W, b, R, r, Gw, Gb, h, with filters scaled so that outputs are of order one."""
    batch, channels, outputs, side, kernel, _ = layer
    filters, n = (outputs, channels, kernel, kernel), HYPERPARAMETERS
    shapes = [(batch, channels, side, side), filters, (outputs,), filters, (outputs,), (outputs, n), (outputs, n)]
    tensors = drawn(*shapes, (batch, n), dtype=dtype)
    for i in (1, 3):
        tensors[i] = tensors[i] * (channels * kernel * kernel) ** -0.5
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    return tensors


def moves(layer):
    return dict(stride=layer[5], padding=layer[4] // 2)


def plain(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h, **how):
    y = F.conv2d(x, weight, bias, **how) + (h @ weight_gate.T)[:, :, None, None] * F.conv2d(x, response_weight, **how)
    return y + ((h @ bias_gate.T) * response_bias)[:, :, None, None]


def differentiated(function, tensors, dtype, dy=None):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_real_layers_and_their_gradients_obey_the_2x_rule(layer, layout, dtype, float32_precision):
    float32_precision("ieee")
    tensors, how = operands(layer, dtype, layout), moves(layer)
    y, got = differentiated(partial(gated_conv2d, **how), tensors, dtype)
    (y_plain, in_dtype), (y_exact, exact) = (
        differentiated(partial(plain, **how), tensors, d) for d in (dtype, torch.float64)
    )
    assert y.is_contiguous(memory_format=layout)
    assert_twice_as_good(y, y_plain, y_exact)
    for i, three in enumerate(zip(got, in_dtype, exact, strict=True)):
        assert_twice_as_good(*three, f"gradient {i}")


@pytest.mark.parametrize(("dtype", "precision"), [*((d, "ieee") for d in DTYPES), (torch.float32, "tf32")], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_configuration_of_the_implicit_product_is_right_on_real_layers(
    layer, dtype, precision, float32_precision
):
    float32_precision(precision)
    x, weight, _, response_weight, *_ = operands(layer, dtype)
    scale, shift = drawn(*[(layer[0], layer[2])] * 2, dtype=torch.float32)
    pair = [layer[5]] * 2, [layer[4] // 2] * 2, [1, 1]

    def by_library(dtype):
        q, p = (F.conv2d(x.to(dtype), w.to(dtype), None, *pair) for w in (response_weight, weight))
        return (p + scale.to(dtype)[:, :, None, None] * q + shift.to(dtype)[:, :, None, None]).relu(), q

    (y_plain, q_plain), (y_exact, q_exact) = by_library(dtype), by_library(torch.float64)
    for name, config in implicit.shipped(x, weight).items():
        y, q = kernels.implicit_gemm(x, weight, response_weight, scale, shift, *pair, True, True, config)
        assert_twice_as_good(y, y_plain, y_exact, f"y, {name}")
        assert_twice_as_good(q.flatten(1, 2), q_plain, q_exact, f"q, {name}")


def test_the_autotuner_times_both_ways_forward_and_remembers():
    tensors, how = operands(LAYERS[3], torch.bfloat16), moves(LAYERS[3])
    with torch.no_grad():
        y = gated_conv2d(*tensors, **how)
        remembered = autotune.cache_file().read_text()
        assert "gated_conv2d forward " in remembered
        assert torch.equal(y, gated_conv2d(*tensors, **how))
    assert autotune.cache_file().read_text() == remembered


def test_the_same_inputs_give_the_same_bits(float32_precision):
    float32_precision("ieee")
    batch, outputs, side = 3, 96, 33
    for layout in LAYOUTS:
        both, dy = (
            t.contiguous(memory_format=layout)
            for t in drawn((batch, 2 * outputs, side, side), (batch, outputs, side, side), dtype=torch.bfloat16)
        )
        scale, shift = drawn(*[(batch, outputs)] * 2, dtype=torch.float32)
        q = both.unflatten(1, (1, 2, outputs))[:, :, 1]
        runs = []
        for _ in range(2):
            y = kernels.epilogue_forward(both, scale, shift, 1, True)
            runs.append([y, *kernels.epilogue_backward(dy, y, q, scale, 1, True, True, True, True)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    x, weight, _, response_weight, *_ = operands(LAYERS[1], torch.bfloat16)
    tables = drawn(*[(128, 192)] * 2, dtype=torch.float32)
    for name, config in implicit.shipped(x, weight).items():
        first, again = (
            kernels.implicit_gemm(x, weight, response_weight, *tables, [1, 1], [1, 1], [1, 1], True, True, config)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_numbers_are_addressed_by_the_epilogue(layout):
    """The last examples, which begin past them, are computed as they are alone."""
    examples, tail = 2**18, slice(2**18 - 2048, None)
    both = torch.ones(examples, 4, 64, 64, dtype=torch.float16, device=DEVICE).contiguous(memory_format=layout)
    both[tail] = drawn((2048, 4, 64, 64), dtype=torch.float16)[0]
    scale, shift = drawn(*[(examples, 2)] * 2, dtype=torch.float32)
    q = both.unflatten(1, (1, 2, 2))[:, :, 1]
    y = kernels.epilogue_forward(both, scale, shift, 1, False)
    assert torch.equal(y[tail], kernels.epilogue_forward(both[tail], scale[tail], shift[tail], 1, False))
    got = kernels.epilogue_backward(y, None, q, scale, 1, False, True, True, True)
    alone = kernels.epilogue_backward(y[tail], None, q[tail], scale[tail], 1, False, True, True, True)
    assert all(torch.equal(a[tail], b) for a, b in zip(got, alone, strict=True))


def test_more_than_2_to_the_31_numbers_are_addressed_by_the_implicit_product():
    """The last image, which begins past them, is computed as it is alone."""
    x = torch.ones(17, 64, 2**11, 2**10, dtype=torch.float16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    x[16, :, 5:90] = 2
    weight, response_weight = drawn(*[(16, 64, 3, 3)] * 2, dtype=torch.float16)
    tables = drawn(*[(17, 16)] * 2, dtype=torch.float32)
    for name, config in implicit.shipped(x, weight).items():
        run = partial(kernels.implicit_gemm, stride=[1, 1], padding=[1, 1], dilation=[1, 1], relu=False)
        y, _ = run(x, weight, response_weight, *tables, save_response=False, config=config)
        alone, _ = run(x[16:], weight, response_weight, *(t[16:] for t in tables), save_response=False, config=config)
        assert torch.equal(y[16:], alone), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    tensors = [t.to("cuda:1") for t in operands(LAYERS[1], torch.bfloat16)]
    with torch.cuda.device(0):
        leaves = [t.requires_grad_() for t in tensors]
        y = gated_conv2d(*leaves, **moves(LAYERS[1]))
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(t.device == tensors[0].device for t in (y, *gradients))
