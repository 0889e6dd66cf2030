"""What only a GPU shows of gated LSTMs: real layers, captured steps, long sequences, the autotuner's own clock."""

import warnings

import pytest
import torch
from gated_lstm_recurrence import operands as recurrence_operands
from gated_lstm_recurrence import ran
from numerics import assert_twice_as_good

from stn_fast.functional import GatedParameters, gated_lstm
from stn_fast.kernels import autotune
from stn_fast.kernels import gated_lstm as kernels
from stn_fast.kernels import gated_lstm_persistent as persistent
from stn_fast.kernels.autotune import Autotuner
from stn_fast.ops.gated_lstm import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
DEVICE = "cuda"
HYPERPARAMETERS = 7
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, B, H: the layers of two language models, cut in time, and of a small one; and sizes that fit no tile
LONG = (2**15 + 2, 128, 128)
LAYERS = [(20, 40, 650), (6, 80, 1150), (35, 20, 200), (9, 33, 72), (5, 3, 37)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STN_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "tuner", Autotuner())


def drawn(*shapes, dtype, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]


def operands(layer, dtype, seed=0):
    """x, h_0, c_0, both sides' weights, h of a layer whose input is as wide as its hidden state."""
    length, batch, hidden = layer
    wide, n = 4 * hidden, HYPERPARAMETERS
    side = [(wide, hidden), (wide,), (wide, hidden), (wide,), (wide, n), (wide, n)]
    shapes = [(length, batch, hidden), (batch, hidden), (batch, hidden), *side, *side, (batch, n)]
    tensors = drawn(*shapes, dtype=torch.float32, seed=seed)
    scales = [1, 1, 1, *2 * [hidden**-0.5, 0.1, hidden**-0.5, 0.1, 0.3, 0.3], 1]
    return [(tensor * scale).to(dtype) for tensor, scale in zip(tensors, scales, strict=True)]


def layer_of(function, tensors):
    x, h_0, c_0, *weights, h = tensors
    y, (_, c_n) = function(x, h_0, c_0, GatedParameters(*weights[:6]), GatedParameters(*weights[6:]), h)
    return y, c_n


def differentiated(function, tensors, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    results = layer_of(function, leaves)
    incoming = drawn(*(r.shape for r in results), dtype=dtype, seed=1)
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, incoming)


def ways(layer, dtype=torch.bfloat16):
    _, batch, hidden = layer
    return ["steps", *([] if persistent.why_not(batch, hidden, dtype, torch.device(DEVICE, 0)) else ["persistent"])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_way_to_run_a_layer_obeys_the_2x_rule(layer, dtype):
    tensors = operands(layer, dtype)
    (plain, in_dtype), (exact, exact_gradients) = (
        differentiated(reference, tensors, d) for d in (dtype, torch.float64)
    )
    for way in ways(layer, dtype):
        with kernels.use(way):
            results, got = differentiated(gated_lstm, tensors, dtype)
        for k, three in enumerate(zip(results, plain, exact, strict=True)):
            assert_twice_as_good(*three, f"result {k}, {way}")
        for k, three in enumerate(zip(got, in_dtype, exact_gradients, strict=True)):
            assert_twice_as_good(*three, f"gradient {k}, {way}")


@pytest.mark.parametrize("layer", LAYERS[:3], ids=str)
def test_the_persistent_way_passes_its_trial(layer):
    if "persistent" not in ways(layer):
        pytest.skip("it doesn't run here")
    with warnings.catch_warnings(), kernels.use("persistent"):
        warnings.simplefilter("error")
        ran(kernels, recurrence_operands(*layer).to(DEVICE))


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_folded_layer_has_its_backward_pass_in_cudnn(frozen, monkeypatch):
    """At one h for all examples: a validation step, whose weights are held, and a step of ordinary training."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    *tensors, h = operands((9, 20, 200), torch.float32)
    results = []
    for function, dtype in ((gated_lstm, torch.float32), (reference, torch.float32), (reference, torch.float64)):
        held = [tensor.detach().to(dtype).requires_grad_(not frozen) for tensor in tensors]
        shared = h[0].detach().to(dtype).requires_grad_()
        of_function = layer_of(function, [*held, shared if function is gated_lstm else shared.expand(20, -1)])
        incoming = drawn(*(r.shape for r in of_function), dtype=torch.float32, seed=1)
        asked = [shared, *([] if frozen else held)]
        results.append([*of_function, *torch.autograd.grad(of_function, asked, [d.to(dtype) for d in incoming])])
    for k, three in enumerate(zip(*results, strict=True)):
        assert_twice_as_good(*three, f"result {k}")


@pytest.mark.parametrize("layer", [(7, 40, 650), (7, 20, 200)], ids=str)
def test_every_way_gives_the_same_bits_again(layer):
    given = recurrence_operands(*layer).to(DEVICE)
    for way in ways(layer):
        first, again = (ran(kernels.WAYS[way], given) for _ in range(2))
        assert all(map(torch.equal, first.values(), again.values())), way


@pytest.mark.parametrize("way", ["steps", "persistent"])
def test_a_whole_step_of_two_layers_can_be_captured_by_its_user(way):
    """Forward and backward inside one torch.cuda.graph, which new inputs are copied into."""
    layer = (6, 20, 200)
    if way not in ways(layer):
        pytest.skip("it doesn't run here")
    with kernels.use(way):
        capture_and_replay(layer)


def capture_and_replay(layer):
    tensors = operands(layer, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    x = leaves[0]

    def step():
        first, _ = layer_of(gated_lstm, leaves)
        second, c_n = layer_of(gated_lstm, [first, *leaves[1:]])
        return torch.autograd.grad((second.float().square().sum() + c_n.float().sum()), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, and tries what must be tried
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = operands(layer, torch.bfloat16, seed)[0]
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        got = [gradient.clone() for gradient in captured]
        assert all(map(torch.equal, got, step()))


def test_the_autotuner_times_every_way_and_remembers():
    given = recurrence_operands(35, 20, 200).to(DEVICE)
    got = ran(kernels, given)
    remembered = autotune.cache_file().read_text()
    for direction in ("forward", "backward"):
        assert f"gated_lstm {direction} " in remembered
    assert all(map(torch.equal, got.values(), ran(kernels, given).values()))
    assert autotune.cache_file().read_text() == remembered


@pytest.mark.parametrize("way", ["steps", "persistent"])
def test_more_than_2_to_the_31_numbers_are_addressed(way):
    """Steps that remember nothing: the last, which begins past them, is computed as it is alone."""
    length, batch, hidden = LONG
    if way not in ways(LONG):
        pytest.skip("it doesn't run here")
    forward, backward = kernels.WAYS[way]
    tail, *_, scale, shift, _, _ = recurrence_operands(1, batch, hidden).to(DEVICE)
    state = torch.zeros(batch, hidden, dtype=tail.dtype, device=DEVICE)
    tail[..., hidden : 2 * hidden] = -60000
    weight = response_weight = tail.new_zeros(4 * hidden, hidden)
    gates = tail.new_zeros(length, batch, 4 * hidden)
    gates[-1:] = tail
    assert gates.numel() > 2**31
    rest = (state, state, weight, response_weight, scale, shift, False, True, False)
    y, _, cells, _ = forward(gates, *rest)
    alone = tail.clone()
    y_alone, _, cells_alone, _ = forward(alone, *rest)
    assert torch.equal(y[-1:], y_alone)
    assert torch.equal(gates[-1:], alone)
    assert torch.equal(cells[-1:], cells_alone)
    dy = torch.zeros_like(y)
    dy[-1] = 1
    tensors = (weight, response_weight, scale, False, False)
    d_gates, _, _ = backward(dy, None, gates, cells, state, *tensors)
    c_before = cells[-2].clone()
    d_alone, _, _ = backward(dy[-1:], None, alone, cells_alone, c_before, *tensors)
    assert torch.equal(d_gates[-1:], d_alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    given = recurrence_operands(4, 20, 200)
    here, elsewhere = given.to("cuda:0"), given.to("cuda:1")
    with torch.cuda.device(0):
        for way in ways((4, 20, 200)):
            with kernels.use(way):
                got, want = ran(kernels, elsewhere), ran(kernels, here)
            assert all(result.device == elsewhere.share.device for result in got.values())
            assert all(torch.equal(got[name].cpu(), want[name].cpu()) for name in want)
