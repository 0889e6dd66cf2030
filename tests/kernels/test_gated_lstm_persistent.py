"""The persistent recurrence of gated LSTMs: its CUDA C++ run on the host, how it is cut up, and when it is refused."""

import shutil

import pytest
import torch
from emulated_device import EmulatedDevice
from gated_lstm_recurrence import assert_right, differentiated, layer, operands, ran
from numerics import assert_twice_as_good

from stn_fast.dispatch import use_backend
from stn_fast.kernels import gated_lstm as gated_lstm_kernels
from stn_fast.kernels import gated_lstm_persistent as persistent
from stn_fast.kernels.gated_lstm_persistent import Limits, Plan, plan_backward, plan_forward
from stn_fast.ops.gated_lstm import gated_lstm, reference

H100, A100 = Limits(132, 232_448), Limits(108, 166_912)
CPU = torch.device("cpu")


# Multiprocessors and shared memory decide how the work is cut up: here one unit a block, several, blocks whose last
# units don't exist, one tile of rows and more, at once and in passes.
@pytest.mark.parametrize(
    ("shape", "limits", "reverse"),
    [
        ((3, 17, 13), Limits(8, 166_912), False),
        ((3, 17, 13), Limits(8, 166_912), True),
        ((2, 3, 13), Limits(13, 166_912), True),
        ((3, 33, 40), Limits(9, 50_000), False),
        ((2, 40, 72), Limits(16, 60_000), True),
        ((2, 65, 57), Limits(24, 60_000), False),
        ((2, 128, 24), Limits(8, 166_912), True),
        ((1, 16, 16), Limits(8, 166_912), False),
    ],
    ids=str,
)
def test_emulated_blocks_obey_the_2x_rule(shape, limits, reverse, monkeypatch):
    EmulatedDevice(*limits).take_the_place_of_cuda(monkeypatch)
    given = operands(*shape, bias=not reverse, last_cell=not reverse)
    assert_right(ran(persistent, given, reverse), given, reverse)


def test_the_shapes_above_take_all_paths():
    sizes = [(17, 13, Limits(8, 166_912)), (33, 40, Limits(9, 50_000)), (40, 72, Limits(16, 60_000))]
    plans = [plan(*each) for each in sizes for plan in (plan_forward, plan_backward)]
    assert {plan.at_once < plan.row_tiles for plan in plans} == {True, False}, "only one pass, or only several"
    assert any(plan.row_tiles % plan.at_once for plan in plans), "no last pass of fewer tiles"
    assert any(plan.blocks * plan.column_tiles > plan.hidden for plan in plans[::2]), "no unit that doesn't exist"


@pytest.mark.parametrize(
    ("shape", "limits"),
    [((2, 40, 650), H100), ((2, 20, 200), A100)],  # 1150 takes half a minute
    ids=["650-H100", "200-A100"],
)
def test_layers_of_the_benchmarks_are_right_in_the_blocks_that_a_gpu_runs(shape, limits, monkeypatch):
    EmulatedDevice(*limits).take_the_place_of_cuda(monkeypatch)
    given = operands(*shape)
    assert_right(ran(persistent, given), given)


def test_the_order_in_which_blocks_and_warps_run_changes_no_bit(monkeypatch):
    device = EmulatedDevice(9, 50_000)
    device.take_the_place_of_cuda(monkeypatch)
    given = operands(3, 33, 40)
    first = ran(persistent, given)
    for device.order in (1, 2, 3):
        assert all(torch.equal(one, first[name]) for name, one in ran(persistent, given).items()), device.order


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("gated_lstm_persistent.cu", "        barrier.wait();\n#pragma unroll\n"),
        ("gated_lstm_persistent.cu", "        if (!last) barrier.wait();\n"),
        ("gated_lstm_persistent.cu", "        barrier.wait();\n#pragma unroll 1"),
        ("gated_lstm_persistent.cu", "synchronise_block();\n            for (int n"),
        ("gated_lstm_persistent.cu", "            if (pass > 0) synchronise_block();  // the shares"),
    ],
    ids=["forward", "parts of dh", "gradients of gates", "shares", "passes"],
)
def test_a_barrier_less_shows_under_emulation(file, line, tmp_path, monkeypatch):
    """So that the test above means something."""
    sources = shutil.copytree(persistent.SOURCE.parent, tmp_path / "cuda")
    code = (sources / file).read_text()
    assert line in code
    kept = line.split(";", 1)[1]
    (sources / file).write_text(code.replace(line, kept, 1))
    given = operands(3, 33, 40)
    right, broken = EmulatedDevice(9, 50_000), EmulatedDevice(9, 50_000, sources)
    right.take_the_place_of_cuda(monkeypatch)
    expected = ran(persistent, given)
    broken.take_the_place_of_cuda(monkeypatch)
    for broken.order in range(4):
        try:
            got = ran(persistent, given)
        except AssertionError:
            return
        if not all(torch.equal(one, expected[name]) for name, one in got.items()):
            return
    pytest.fail("nothing went wrong")


def test_what_nobody_wants_is_not_computed_and_changes_nothing_else(monkeypatch):
    device = EmulatedDevice(8, 166_912)
    device.take_the_place_of_cuda(monkeypatch)
    given = operands(3, 17, 13)
    everything = ran(persistent, given)
    share, *rest, dy, d_last_cell = given
    gates = share.clone()
    y, c_n, cells, response = persistent.forward(gates, *rest, False, False, False)
    assert cells is None
    assert response is None
    assert torch.equal(gates, share), "x's share was overwritten, though nobody keeps gates"
    assert torch.equal(y, everything["y"])
    assert torch.equal(c_n, everything["c_n"])
    _, c_0, weight, response_weight, scale, _ = rest
    kept = everything["gates"], everything["cells"]
    d_gates, dh_0, dc_0 = persistent.backward(
        dy, d_last_cell, *kept, c_0, weight, response_weight, scale, False, want_h_0=False
    )
    assert dh_0 is None
    assert torch.equal(d_gates, everything["d_gates"])
    assert torch.equal(dc_0, everything["dc_0"])


@pytest.mark.parametrize(("batch", "hidden"), [(40, 650), (80, 1150), (20, 200)], ids=str)
def test_layers_of_the_benchmarks_fit_an_h100(batch, hidden):
    for plan in (plan_forward(batch, hidden, H100), plan_backward(batch, hidden, H100)):
        assert isinstance(plan, Plan)
        assert plan.blocks <= H100.multiprocessors, "blocks that can't all be resident would wait for ever"
        assert plan.shared_bytes <= H100.shared_bytes
    weights = 8 * hidden * hidden * 2
    assert plan.blocks * plan.shared_bytes >= weights, "the weights can't all be there"


@pytest.mark.parametrize("multiprocessors", [7, 8, 20, 108, 132, 148])
def test_no_plan_asks_for_more_than_there_is(multiprocessors):
    limits = Limits(multiprocessors, A100.shared_bytes)
    for batch, hidden in ((b, h) for b in (1, 16, 40, 128) for h in (1, 8, 13, 200, 650, 1024, 1150)):
        for plan in (plan_forward(batch, hidden, limits), plan_backward(batch, hidden, limits)):
            if isinstance(plan, str):
                continue
            assert plan.blocks <= multiprocessors
            assert plan.shared_bytes <= limits.shared_bytes
            assert plan.row_tiles * 16 >= batch
    assert "multiprocessors" in plan_backward(4, 8, Limits(7, A100.shared_bytes))


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    assert "1150 hidden units don't fit" in plan_forward(80, 1150, A100)
    assert "128 examples of 1150 hidden units don't fit" in plan_forward(128, 1150, H100)
    assert "128 examples of 760 hidden units are 6 cells a thread" in plan_backward(128, 760, Limits(78, 232_448))
    monkeypatch.setattr(persistent, "_limits", lambda _: A100)
    given = operands(1, 1, 1150)
    with pytest.raises(ValueError, match=r"1150 hidden units don't fit: .* 166912"):
        persistent.forward(*given[:-2], False, True, True)


def test_why_not_says_what_is_missing(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert "bfloat16" in persistent.why_not(40, 650, torch.float32, cuda)
    assert "1 to 128 examples, and there are 129" in persistent.why_not(129, 650, torch.bfloat16, cuda)
    assert "'cpu'" in persistent.why_not(40, 650, torch.bfloat16, CPU)
    monkeypatch.setattr(persistent, "unavailable", lambda: "ImportError: no cuda.bindings")
    assert "no cuda.bindings): pip install" in persistent.why_not(40, 650, torch.bfloat16, cuda)
    monkeypatch.setattr(persistent, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "capability 8.0" in persistent.why_not(40, 650, torch.bfloat16, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(persistent, "_limits", lambda _: H100)
    assert persistent.why_not(40, 650, torch.bfloat16, cuda) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is off")
@pytest.mark.parametrize("expanded", [False, True])
def test_the_operation_takes_it_where_it_is_asked_for(expanded, monkeypatch):
    """Every gradient of gated_lstm, from emulated recurrences between the interpreter's products."""
    device = EmulatedDevice(8, 166_912)
    device.take_the_place_of_cuda(monkeypatch)
    monkeypatch.setattr(persistent, "why_not", lambda *_: None)
    monkeypatch.setattr(gated_lstm_kernels, "_what_is_wrong", lambda *_: None)
    leaves, incoming = layer(2, 5, 5, 13, 2)
    given = None if expanded else incoming
    with use_backend("triton"), gated_lstm_kernels.use("persistent"):
        got = differentiated(gated_lstm, leaves, given, torch.bfloat16)
    assert [expression.split("<")[0][-8:] for expression, _ in device.launched] == ["_forward", "backward"]
    plain, exact = (differentiated(reference, leaves, given, d) for d in (torch.bfloat16, torch.float64))
    for three in zip(got, plain, exact, strict=True):
        assert_twice_as_good(*three)
