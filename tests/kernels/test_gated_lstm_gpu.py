"""What only a GPU shows of gated LSTMs: real layers, CUDA graphs, long sequences, the autotuner's own clock."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast.functional import Weights, gated_lstm
from stn_fast.kernels import autotune
from stn_fast.kernels import gated_lstm as kernels
from stn_fast.kernels import gated_lstm_sequence as sequence
from stn_fast.kernels import gated_lstm_steps as steps
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
    y, (_, c_n) = function(x, h_0, c_0, Weights(*weights[:6]), Weights(*weights[6:]), h)
    return y, c_n


def differentiated(function, tensors, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    results = layer_of(function, leaves)
    incoming = drawn(*(r.shape for r in results), dtype=dtype, seed=1)
    return [r.detach() for r in results], torch.autograd.grad(results, leaves, incoming)


def ways(layer, dtype):
    shipped = sequence.configs(torch.cuda.get_device_capability()) if sequence.applies(dtype, layer[2]) else []
    return ["steps", "graph", *(sequence.config_name(config) for config in shipped)]


def recurrence_operands(layer, dtype, seed=0):
    """x's share, h_0, c_0, W, R, scale, shift, and the gradients of y and c_n."""
    length, batch, hidden = layer
    wide = 4 * hidden
    shapes = [(length, batch, wide), *2 * [(batch, hidden)], *2 * [(wide, hidden)], *2 * [(batch, wide)]]
    tensors = drawn(*shapes, (length, batch, hidden), (batch, hidden), dtype=torch.float32, seed=seed)
    for k in (3, 4):
        tensors[k] *= hidden**-0.5
    return [tensor.to(dtype) for tensor in tensors]


def run(tensors, config, save=True):
    gates, *rest, dy, d_last_cell = tensors
    gates = gates.clone()
    y, c_n, cells, response = kernels.forward(gates, *rest, False, save, save, config=config)
    if not save:
        return y, c_n
    _, c_0, weight, response_weight, scale, _ = rest
    backward = kernels.backward(
        dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, False, True, config=config
    )
    return y, c_n, gates, cells, response, *backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_way_to_run_a_layer_obeys_the_2x_rule(layer, dtype, monkeypatch):
    tensors = operands(layer, dtype)
    (plain, in_dtype), (exact, exact_gradients) = (
        differentiated(reference, tensors, d) for d in (dtype, torch.float64)
    )
    forward, backward = kernels.forward, kernels.backward
    for way in ways(layer, dtype):
        monkeypatch.setattr(kernels, "forward", lambda *given, way=way: forward(*given, config=way))
        monkeypatch.setattr(kernels, "backward", lambda *given, way=way: backward(*given, config=way))
        for _ in range(2):  # the second time a graph is replayed
            results, got = differentiated(gated_lstm, tensors, dtype)
            for k, three in enumerate(zip(results, plain, exact, strict=True)):
                assert_twice_as_good(*three, f"result {k}, {way}")
            for k, three in enumerate(zip(got, in_dtype, exact_gradients, strict=True)):
                assert_twice_as_good(*three, f"gradient {k}, {way}")


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


def test_a_graph_gives_the_bits_of_its_launches_for_any_tensors():
    """Other tensors at other addresses, one after the other and all alive, in float32 as well."""
    for dtype in DTYPES:
        given = [recurrence_operands((7, 20, 200), dtype, seed) for seed in range(3)]
        want = [run(tensors, "steps") for tensors in given]
        for _ in range(2):
            got = [run(tensors, "graph") for tensors in given]
            for mine, wish in zip(got, want, strict=True):
                assert all(map(torch.equal, mine, wish))


def test_every_way_gives_the_same_bits_again():
    for layer in ((7, 40, 650), (7, 20, 200)):
        tensors = recurrence_operands(layer, torch.bfloat16)
        for way in ways(layer, torch.bfloat16):
            assert all(map(torch.equal, run(tensors, way), run(tensors, way))), way


def test_graphs_made_in_inference_mode_serve_training_and_the_oldest_makes_place(monkeypatch):
    monkeypatch.setattr(steps, "MAX_GRAPHS", 2)
    for mode in (torch.inference_mode, torch.no_grad):
        for length in (2, 3, 4, 2):
            tensors = recurrence_operands((length, 5, 24), torch.float32)
            with mode():
                got = run(tensors, "graph", save=False)
            assert all(map(torch.equal, got, run(tensors, "steps", save=False)))
            assert len(steps._captured) <= 2


def test_graphs_of_two_streams_do_not_disturb_each_other():
    given = [recurrence_operands((30, 20, 200), torch.float32, seed) for seed in range(2)]
    want = [run(tensors, "steps") for tensors in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(3):
        got = []
        for stream, tensors in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(tensors, "graph"))
        torch.cuda.synchronize()
        for mine, wish in zip(got, want, strict=True):
            assert all(map(torch.equal, mine, wish))


def test_a_whole_step_of_two_layers_can_be_captured_by_its_user():
    """Forward and backward inside one torch.cuda.graph, which new inputs are copied into."""
    layer = (6, 20, 200)
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
        step()  # compiles, and lets the autotuner choose
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
    tensors = recurrence_operands((35, 20, 200), torch.bfloat16)
    got = run(tensors, None)
    remembered = autotune.cache_file().read_text()
    for direction in ("forward", "backward"):
        assert f"gated_lstm {direction} " in remembered
    assert all(map(torch.equal, got, run(tensors, None)))
    assert autotune.cache_file().read_text() == remembered


@pytest.mark.parametrize("config", ["steps", "graph", "sequence"])
def test_more_than_2_to_the_31_numbers_are_addressed(config):
    """Steps that remember nothing: the last, which begins past them, is computed as it is alone."""
    length, batch, hidden = 2**13 + 2, 512, 128
    config = ways((length, batch, hidden), torch.float16)[-1] if config == "sequence" else config
    *_, weight, response_weight, scale, shift, _, _ = recurrence_operands((1, batch, hidden), torch.float16)
    state, (tail,) = (
        torch.zeros(batch, hidden, dtype=torch.float16, device=DEVICE),
        drawn((1, batch, 4 * hidden), dtype=torch.float16),
    )
    tail[..., hidden : 2 * hidden] = -60000
    weight, response_weight = torch.zeros_like(weight), torch.zeros_like(response_weight)
    gates = torch.zeros(length, batch, 4 * hidden, dtype=torch.float16, device=DEVICE)
    gates[-1:] = tail
    assert gates.numel() > 2**31
    rest = (state, state, weight, response_weight, scale, shift, False, True, False)
    y, _, cells, _ = kernels.forward(gates, *rest, config=config)
    alone = tail.clone()
    y_alone, _, cells_alone, _ = kernels.forward(alone, *rest, config=config)
    assert torch.equal(y[-1:], y_alone)
    assert torch.equal(gates[-1:], alone)
    assert torch.equal(cells[-1:], cells_alone)
    dy = torch.zeros_like(y)
    dy[-1] = 1
    tensors = (weight, response_weight, scale, False, False)
    d_gates, _, _ = kernels.backward(dy, None, gates, cells, state, *tensors, config=config)
    c_before = cells[-2].clone()
    d_alone, _, _ = kernels.backward(dy[-1:], None, alone, cells_alone, c_before, *tensors, config=config)
    assert torch.equal(d_gates[-1:], d_alone)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    tensors = recurrence_operands((4, 20, 200), torch.bfloat16)
    elsewhere = [tensor.to("cuda:1") for tensor in tensors]
    with torch.cuda.device(0):
        for way in ways((4, 20, 200), torch.bfloat16):
            for _ in range(2):
                got = run(elsewhere, way)
            assert all(result.device == elsewhere[0].device for result in got)
            assert all(torch.equal(mine.cpu(), wish.cpu()) for mine, wish in zip(got, run(tensors, way), strict=True))
