"""The recurrence of gated LSTMs, every way to compute it, against plain torch in float64."""

from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_lstm as kernels
from stn_fast.kernels import gated_lstm_sequence as sequence
from stn_fast.kernels import gated_lstm_steps as steps
from stn_fast.kernels.autotune import Autotuner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("gates", "h_0", "c_0")
# T, B, H
SHAPES = [(4, 5, 7), (1, 3, 16), (3, 17, 33)]
CONFIGS = {sequence.config_name(c): c for c in (*sequence.HOPPER_CONFIGS, *sequence.AMPERE_CONFIGS)}
SMALL = sequence.AMPERE_CONFIGS[0]


def operands(length, batch, hidden, dtype, bias=True):
    """x's share, h_0, c_0, W, R, scale, shift, and the gradients of y and c_n, drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(length + batch + hidden)
    wide = 4 * hidden
    shapes = [(length, batch, wide), (batch, hidden), (batch, hidden), (wide, hidden), (wide, hidden), (batch, wide)]
    shapes += [(batch, wide), (length, batch, hidden), (batch, hidden)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for i in (3, 4):
        drawn[i] *= hidden**-0.5
    *tensors, dy, d_last_cell = (t.to(dtype) for t in drawn)
    return [*tensors[:6], tensors[6] if bias else None], (dy, d_last_cell)


def plain(share, h, c, weight, response_weight, scale, shift, reverse=False):
    """y, c_n and what is kept: activated gates, cell states, Q."""
    ys, gates, cells, responses = [], [], [], []
    for x in share.unbind(0)[:: -1 if reverse else 1]:
        q = h @ response_weight.T
        before = x + h @ weight.T + scale * q + (0 if shift is None else shift)
        i, f, g, o = before.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        for kept, one in zip((ys, gates, cells, responses), (h, torch.cat([i, f, g, o], -1), c, q), strict=True):
            kept.append(one)
    y, *kept = (torch.stack(one[:: -1 if reverse else 1]) for one in (ys, gates, cells, responses))
    return y, c, *kept


def differentiated(tensors, incoming, dtype, reverse):
    """What `plain` gives in this dtype, and the gradients of NAMES."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_(i < 3) for i, t in enumerate(tensors)]
    results = plain(*leaves, reverse=reverse)
    used, given = zip(
        *((r, d.to(dtype)) for r, d in zip(results, incoming, strict=False) if d is not None), strict=True
    )
    return results, torch.autograd.grad(used, leaves[:3], given)


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def ran(tensors, config, reverse=False, save=True, save_response=True):
    """y, c_n and what is kept, from a copy of x's share, which becomes the gates."""
    share, *rest = on_device(*tensors)
    gates = share.clone()
    y, c_n, cells, response = kernels.forward(gates, *rest, reverse, save, save_response, config=config)
    return y, c_n, gates, cells, response


def ran_backward(tensors, incoming, kept, config, reverse=False, want_h_0=True):
    _, _, c_0, weight, response_weight, scale, _ = on_device(*tensors)
    gates, cells = kept
    return kernels.backward(
        *on_device(*incoming), gates, cells, c_0, weight, response_weight, scale, reverse, want_h_0, config=config
    )


def assert_right(tensors, incoming, config, reverse=False):
    (exact, exact_gradients), (in_dtype, gradients) = (
        differentiated(tensors, incoming, d, reverse) for d in (torch.float64, tensors[0].dtype)
    )
    got = ran(tensors, config, reverse)
    for name, *three in zip(("y", "c_n", "gates", "cells", "response"), got, in_dtype, exact, strict=True):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)
    for name, *three in zip(
        NAMES, ran_backward(tensors, incoming, got[2:4], config, reverse), gradients, exact_gradients, strict=True
    ):
        assert_twice_as_good(*three, name=name)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_obeys_the_2x_rule_step_by_step(shape, dtype, bias, reverse):
    assert_right(*operands(*shape, dtype, bias), "steps", reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_obeys_the_2x_rule_in_one_launch(shape, dtype, reverse):
    assert_right(*operands(*shape, dtype, bias=not reverse), SMALL, reverse)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_obeys_the_2x_rule(config):
    assert_right(*operands(2, 33, 40, torch.bfloat16), CONFIGS[config])


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1), (3, 2, 130)], ids=str)
@pytest.mark.parametrize("config", ["steps", "one launch"])
def test_sizes_of_one_and_long_rows_are_right(config, shape):
    """In float32: of two 16-bit results of a few numbers, either may be by far the closer by chance."""
    assert_right(*operands(*shape, torch.float32), config if config == "steps" else SMALL)


@pytest.mark.parametrize("config", ["steps", "one launch"])
@pytest.mark.parametrize("save", [(True, False), (False, False)], ids=str)
def test_only_what_is_asked_for_is_kept(config, save):
    """Without `save` the gates stay x's share: nobody will read them."""
    config = config if config == "steps" else SMALL
    tensors, incoming = operands(3, 5, 7, torch.float32)
    y, c_n, gates, cells, response = ran(tensors, config, False, *save)
    y_plain, c_plain, gates_plain, *_ = plain(*tensors)
    exact = plain(*(t.double() for t in tensors))
    assert_twice_as_good(y, y_plain, exact[0])
    assert_twice_as_good(c_n, c_plain, exact[1])
    assert response is None
    assert (cells is not None) == save[0]
    if not save[0]:
        assert torch.equal(gates.cpu(), tensors[0])
        return
    assert_twice_as_good(gates, gates_plain, exact[2])
    assert ran_backward(tensors, incoming, (gates, cells), config, want_h_0=False)[1] is None


@pytest.mark.parametrize("config", ["steps", "one launch"])
def test_the_last_cell_state_may_have_no_gradient(config):
    tensors, (dy, _) = operands(3, 5, 7, torch.float32)
    assert_right(tensors, (dy, None), config if config == "steps" else SMALL)


def test_saturated_gates_and_tiny_ones_keep_their_digits():
    """tanh is made of exp here, which overflows or cancels where one isn't careful."""
    tensors, incoming = operands(3, 4, 5, torch.float32)
    for scale in (1e-4, 1e-2, 1.0, 40.0, 1e4):
        assert_right([tensors[0] * scale, *(t * min(scale, 1.0) for t in tensors[1:])], incoming, "steps")


@pytest.fixture
def graphs(monkeypatch):
    """What `replay` needs of CUDA graphs, without a device: capturing launches nothing, replaying launches again."""

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1
            next(known.prepared for known in steps._captured.values() if known.graph is self).launch()

    @contextmanager
    def capture(*_, **__):
        with pytest.MonkeyPatch.context() as captured:
            for kind in (steps.Forward, steps.Backward):
                captured.setattr(kind, "launch", lambda _: None)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(steps, "_captured", OrderedDict())
    monkeypatch.setattr(steps, "_capture_streams", {})
    monkeypatch.setattr(kernels, "_can_replay", lambda _: True)
    return Graph


@pytest.mark.skipif(DEVICE != "cpu", reason="real graphs are tested in test_gated_lstm_gpu.py")
def test_a_graph_serves_other_tensors_and_keeps_nothing_of_the_last_ones(graphs):
    """Two sequences forward, then both backward: each as if it were the only one."""
    first, second = ([t + k for t in operands(3, 5, 7, torch.float32)[0]] for k in (0, 0.1))
    incoming = operands(3, 5, 7, torch.float32)[1]
    want = [ran(tensors, "steps") for tensors in (first, second)]
    got = [ran(tensors, "graph") for tensors in (first, second)]
    for mine, wish in zip(got, want, strict=True):
        assert all(map(torch.equal, mine, wish))
    gradients, wanted = (
        [ran_backward(tensors, incoming, kept[2:4], way) for tensors, kept in zip((first, second), of, strict=True)]
        for way, of in (("graph", got), ("steps", want))
    )
    for mine, wish in zip(gradients, wanted, strict=True):
        assert all(map(torch.equal, mine, wish))
    assert graphs.replays == 2
    assert len(steps._captured) == 2


def forward_and_backward(
    way, dtype=torch.float32, bias=True, reverse=False, save=True, save_response=True, want_h_0=True
):
    tensors, incoming = operands(2, 3, 4, dtype, bias)
    results = ran(tensors, way, reverse, save, save_response)
    if not save:
        return results
    return *results, *ran_backward(tensors, incoming, results[2:4], way, reverse, want_h_0)


@pytest.mark.skipif(DEVICE != "cpu", reason="real graphs are tested in test_gated_lstm_gpu.py")
@pytest.mark.parametrize(
    "change",
    [
        dict(reverse=True),
        dict(bias=False),
        dict(save=False),
        dict(save_response=False),
        dict(want_h_0=False),
        dict(dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_a_graph_serves_no_other_kind_of_call_than_its_own(change, graphs):
    for call in (change, {}, change, {}):
        got, want = (forward_and_backward(way, **call) for way in ("graph", "steps"))
        for mine, wish in zip(got, want, strict=True):
            assert mine is wish is None or torch.equal(mine, wish)
    assert graphs.replays >= 3


@pytest.mark.skipif(DEVICE != "cpu", reason="real graphs are tested in test_gated_lstm_gpu.py")
@pytest.mark.parametrize(
    "change",
    [
        dict(fp32_precision="tf32"),
        dict(allow_fp16_reduced_precision_reduction=False),
        dict(allow_bf16_reduced_precision_reduction=False),
    ],
    ids=str,
)
def test_a_graph_serves_no_other_precision_of_products_than_its_own(change, graphs, monkeypatch):
    tensors, _ = operands(2, 3, 4, torch.float32)
    settings = dict(
        fp32_precision="ieee", allow_fp16_reduced_precision_reduction=True, allow_bf16_reduced_precision_reduction=True
    )
    for chosen in (settings, settings | change):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**chosen))
        ran(tensors, "graph")
    assert graphs.replays == 0


@pytest.mark.skipif(DEVICE != "cpu", reason="real graphs are tested in test_gated_lstm_gpu.py")
def test_graphs_made_in_inference_mode_serve_training_and_the_oldest_makes_place(graphs, monkeypatch):
    monkeypatch.setattr(steps, "MAX_GRAPHS", 2)
    shapes = [(2, 3, 4), (3, 3, 4), (4, 3, 4), (2, 3, 4)]
    for mode in (torch.inference_mode(), nullcontext()):
        for shape in shapes:
            tensors, _ = operands(*shape, torch.float32)
            with mode:
                got = ran(tensors, "graph")
            assert all(map(torch.equal, got, ran(tensors, "steps")))
            assert len(steps._captured) <= 2
    assert graphs.replays == 1


def test_an_unknown_way_is_named_with_the_known_ones():
    tensors, _ = operands(2, 3, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=r"config='fastest' is none of \['steps',.* 'sequence-"):
        ran(tensors, "fastest")


def test_one_launch_is_for_small_layers_in_16_bits():
    assert sequence.applies(torch.bfloat16, 200)
    assert sequence.applies(torch.float16, sequence.MAX_HIDDEN)
    for dtype, hidden in ((torch.float32, 200), (torch.bfloat16, 264), (torch.bfloat16, 199)):
        assert not sequence.applies(dtype, hidden)


def test_float64_is_refused():
    tensors, _ = operands(2, 3, 4, torch.float64)
    with pytest.raises(TypeError, match="gates is float64"):
        ran(tensors, "steps")


def test_the_autotuner_times_copies_and_its_choice_is_taken(monkeypatch, tmp_path):
    """Timing a way activates its gates; the sequence itself must still hold x's share when its turn comes."""
    asked = []

    def timer(candidate):
        candidate()
        asked.append(candidate.args[0])
        return 1.0 if candidate.args[0] == sequence.config_name(SMALL) else 2.0

    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "tuner", Autotuner(timer, tmp_path / "autotune.json"))
    monkeypatch.setattr(sequence, "HOPPER_CONFIGS", [SMALL])
    tensors, incoming = operands(3, 5, 16, torch.bfloat16)
    assert_right(tensors, incoming, None)
    ways = ["steps", *(["graph"] if DEVICE == "cuda" else []), sequence.config_name(SMALL)]
    assert asked == 2 * ways
    got = ran(tensors, None)
    assert all(map(torch.equal, got, ran(tensors, sequence.config_name(SMALL))))
    assert asked == 2 * ways
