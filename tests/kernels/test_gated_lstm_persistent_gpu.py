"""The persistent recurrence of gated LSTMs on a real GPU: cooperative launches, barriers of the grid, real layers."""

import threading

import pytest
import torch
from cuda_compiler import require_compiler
from gated_lstm_recurrence import assert_right, differentiated, layer, operands, ran
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_lstm as gated_lstm_kernels
from stn_fast.kernels import gated_lstm_persistent as persistent
from stn_fast.ops.gated_lstm import gated_lstm, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_what_it_runs_on():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    require_compiler()


def refused(batch, hidden):
    return persistent.why_not(batch, hidden, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))


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
    assert_right(ran(persistent, given, reverse), given, reverse)


def test_repeated_launches_give_the_same_bits():
    """A barrier that lets a block through too early shows as a difference now and then."""
    given = operands(50, 40, 650).to("cuda")
    first = ran(persistent, given)
    for _ in range(50):
        again = ran(persistent, given)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_launches_keep_the_order_of_the_current_stream():
    given = operands(20, 40, 200).to("cuda")
    expected = ran(persistent, given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = type(given)(*(tensor.clone() for tensor in given))
        got = ran(persistent, late)
    stream.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_thread_that_has_not_used_cuda_before_can_launch():
    """As autograd's, which runs the backward."""
    given = operands(3, 5, 64).to("cuda")
    expected, got = ran(persistent, given), []
    thread = threading.Thread(target=lambda: got.append(ran(persistent, given)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(got[0][name], expected[name]) for name in expected)


def test_a_captured_launch_can_be_replayed():
    given = operands(10, 20, 200).to("cuda")
    expected = ran(persistent, given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ran(persistent, given)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_the_operation_takes_it_forward_and_backward_where_it_is_asked_for(monkeypatch):
    leaves, incoming = layer(35, 20, 64, 200, 3, device="cuda")
    launched = []
    launch = persistent._launch
    monkeypatch.setattr(persistent, "_launch", lambda name, *rest: launched.append(name) or launch(name, *rest))
    with gated_lstm_kernels.use("steps"):
        differentiated(gated_lstm, leaves, incoming, torch.bfloat16)
    assert not launched
    with gated_lstm_kernels.use("persistent"):
        got = differentiated(gated_lstm, leaves, incoming, torch.bfloat16)
    assert launched
    plain, exact = (differentiated(reference, leaves, incoming, d) for d in (torch.bfloat16, torch.float64))
    for three in zip(got, plain, exact, strict=True):
        assert_twice_as_good(*three)
