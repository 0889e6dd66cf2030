"""The persistent recurrence of gated LSTMs on a real GPU: cooperative launches, barriers of the grid, real layers."""

import threading

import pytest
import torch
from gated_lstm_recurrence import assert_right, differentiated, layer, operands
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_lstm_persistent
from stn_fast.kernels.gated_lstm_persistent import use_persistent, why_not
from stn_fast.ops.gated_lstm import gated_lstm, reference

pytestmark = pytest.mark.gpu
NAMES = ("y", "c_n", "gates", "cells", "response", "d_gates", "dh_0", "dc_0")


@pytest.fixture(autouse=True)
def needs_what_it_runs_on():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("cuda.core")


def refused(batch, hidden):
    return why_not(batch, hidden, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))


def ran(given, reverse=False):
    share, *rest, dy, d_last_cell = given
    gates = share.clone()
    y, c_n, cells, response = gated_lstm_persistent.forward(gates, *rest, reverse, True, True)
    _, c_0, weight, response_weight, scale, _ = rest
    gradients = gated_lstm_persistent.backward(
        dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, reverse, True
    )
    return dict(zip(NAMES, (y, c_n, gates, cells, response, *gradients), strict=True))


# The layers of the benchmarks, and sizes that no tile divides, up to the most examples.
@pytest.mark.parametrize(
    "shape",
    [(70, 40, 650), (70, 80, 1150), (35, 20, 200), (1, 1, 1), (5, 17, 13), (3, 33, 331), (4, 128, 512), (200, 7, 40)],
    ids=str,
)
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
def test_every_size_obeys_the_2x_rule(shape, reverse):
    if reason := refused(*shape[1:]):
        pytest.skip(reason)
    given = operands(*shape, bias=not reverse, last_cell=not reverse).to("cuda")
    assert_right(ran(given, reverse), given, reverse)


def test_repeated_launches_give_the_same_bits():
    """A barrier that lets a block through too early shows as a difference now and then."""
    given = operands(50, 40, 650).to("cuda")
    first = ran(given)
    for _ in range(50):
        again = ran(given)
        assert all(torch.equal(again[name], first[name]) for name in NAMES)


def test_launches_keep_the_order_of_the_current_stream():
    given = operands(20, 40, 200).to("cuda")
    expected = ran(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = type(given)(*(tensor.clone() for tensor in given))
        got = ran(late)
    stream.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


def test_a_thread_that_has_not_used_cuda_before_can_launch():
    """As autograd's, which runs the backward."""
    given = operands(3, 5, 64).to("cuda")
    expected, got = ran(given), []
    thread = threading.Thread(target=lambda: got.append(ran(given)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(got[0][name], expected[name]) for name in NAMES)


def test_a_captured_launch_can_be_replayed():
    given = operands(10, 20, 200).to("cuda")
    expected = ran(given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ran(given)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(captured[name], expected[name]) for name in NAMES)


def test_the_operation_takes_it_forward_and_backward_where_it_is_asked_for(monkeypatch):
    leaves, incoming = layer(35, 20, 64, 200, 3, device="cuda")
    launched = []
    launch = gated_lstm_persistent._launch
    monkeypatch.setattr(
        gated_lstm_persistent, "_launch", lambda name, *rest: launched.append(name) or launch(name, *rest)
    )
    differentiated(gated_lstm, leaves, incoming, torch.bfloat16)
    assert not launched, "used without being proven or asked for"
    with use_persistent():
        got = differentiated(gated_lstm, leaves, incoming, torch.bfloat16)
    assert len(launched) == 2
    plain, exact = (differentiated(reference, leaves, incoming, d) for d in (torch.bfloat16, torch.float64))
    for three in zip(got, plain, exact, strict=True):
        assert_twice_as_good(*three)
