"""The recurrence of gated LSTMs against plain torch in float64, the choice between its two ways, and what guards it."""

import shutil
import warnings

import pytest
import torch
from emulated_device import EmulatedDevice
from gated_lstm_recurrence import Operands, assert_right, operands, ran

from stn_fast.kernels import gated_lstm as kernels
from stn_fast.kernels import gated_lstm_persistent as persistent
from stn_fast.kernels import gated_lstm_steps as steps
from stn_fast.kernels.autotune import DOES_NOT_RUN, Autotuner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, B, H: rows of private buffers are padded, or not
SHAPES = [(4, 5, 7), (1, 3, 16), (3, 17, 33)]


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_obeys_the_2x_rule(shape, dtype, bias, reverse):
    given = operands(*shape, dtype, bias=bias, last_cell=bias).to(DEVICE)
    got = ran(steps, given, reverse)
    assert_right(got, given, reverse)
    assert {name: result.dtype for name, result in got.items() if result.dtype != dtype} == (
        {} if dtype == torch.float32 else {"dc_0": torch.float32}
    )


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1), (3, 2, 130), (2, 2, 300)], ids=str)
def test_sizes_of_one_and_long_rows_are_right(shape):
    """In float32: of two 16-bit results of a few numbers, either may be by far the closer by chance."""
    given = operands(*shape, torch.float32).to(DEVICE)
    assert_right(ran(steps, given), given)


@pytest.mark.parametrize("save", [(True, False), (False, False)], ids=str)
def test_only_what_is_asked_for_is_kept(save):
    """Without `save` the gates stay x's share: nobody will read them."""
    given = operands(3, 5, 7, torch.float32).to(DEVICE)
    share, *rest, dy, d_last_cell = given
    gates, everything = share.clone(), ran(steps, given)
    y, c_n, cells, response = steps.forward(gates, *rest, False, *save)
    assert torch.equal(y, everything["y"])
    assert torch.equal(c_n, everything["c_n"])
    assert response is None
    assert (cells is not None) == save[0]
    assert torch.equal(gates, everything["gates"] if save[0] else share)
    if save[0]:
        _, c_0, weight, response_weight, scale, _ = rest
        d_gates, dh_0, _ = steps.backward(
            dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, False, False
        )
        assert dh_0 is None
        assert torch.equal(d_gates, everything["d_gates"])


def test_saturated_gates_and_tiny_ones_keep_their_digits():
    """tanh is made of exp here, which overflows or cancels where one isn't careful."""
    given = operands(3, 4, 5, torch.float32).to(DEVICE)
    for scale in (1e-4, 1e-2, 1.0, 40.0, 1e4):
        scaled = Operands(given.share * scale, *(tensor * min(scale, 1.0) for tensor in given[1:]))
        assert_right(ran(steps, scaled), scaled)


def test_library_products_get_rows_of_whole_vectors(monkeypatch):
    """cuBLAS takes a slow kernel for rows that don't begin at 16 bytes."""
    products, mm = [], torch.mm

    def recording(left, right, *, out):
        products.extend((left, right, out))
        return mm(left, right, out=out)

    monkeypatch.setattr(torch, "mm", recording)
    ran(steps, operands(2, 3, 13).to(DEVICE))
    assert len(products) == 2 * 2 * 3
    for factor in products:
        assert max(factor.stride()) * factor.element_size() % 16 == 0
        assert factor.data_ptr() % 16 == 0


def test_an_unknown_way_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\['steps', 'persistent'\], got 'graph'"), kernels.use("graph"):
        pass


def test_float64_is_refused():
    with pytest.raises(TypeError, match="gates is float64"):
        ran(kernels, operands(2, 3, 4, torch.float64))


def test_sizes_beyond_32_bits_are_refused():
    gates = torch.empty(1, 2**20, 4 * 512, device="meta")
    with pytest.raises(ValueError, match="32 bits"):
        kernels._way("forward", gates, ())


SIZES = (3, 5, 13)


class Choosing:
    """The package where both ways may run: the persistent kernels emulated, a clock that counts and favours one."""

    def __init__(self, monkeypatch, tmp_path):
        self.monkeypatch, self.path = monkeypatch, tmp_path / "autotune.json"
        self.device = EmulatedDevice(8, 166_912)
        self.fastest, self.timed = "persistent", []
        monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
        monkeypatch.setattr(persistent, "why_not", lambda *_: None)
        monkeypatch.setattr(kernels, "TRIAL_STEPS", 3)
        self.start_process()

    def start_process(self):
        """Forgets what a process keeps; the choices are in a file."""
        self.timed.clear()
        self.device.launched.clear()
        self.device.take_the_place_of_cuda(self.monkeypatch)
        self.monkeypatch.setattr(kernels, "_tried", {})
        self.monkeypatch.setattr(kernels, "tuner", Autotuner(self.clock, self.path))

    def clock(self, candidate):
        (way,) = candidate.args
        self.timed.append(way)
        try:
            candidate()
        except DOES_NOT_RUN:  # as the real clock does
            return float("inf")
        return 1.0 if way == self.fastest else 2.0

    def break_line(self, tmp_path, line, by):
        """The kernels with another line in the place of this one."""
        sources = shutil.copytree(persistent.SOURCE.parent, tmp_path / "cuda")
        file = sources / persistent.SOURCE.name
        code = file.read_text()
        assert code.count(line) == 1
        file.write_text(code.replace(line, by))
        self.device.sources = sources


@pytest.fixture
def choosing(monkeypatch, tmp_path):
    if DEVICE != "cpu":
        pytest.skip("the kernels are emulated on the CPU")
    return Choosing(monkeypatch, tmp_path)


@pytest.mark.parametrize("fastest", ["persistent", "steps"])
def test_the_fastest_way_is_taken_and_remembered(fastest, choosing):
    """Timing a way activates its gates; the sequence itself must still hold x's share when its turn comes."""
    choosing.fastest = fastest
    given = operands(*SIZES)
    got = ran(kernels, given)
    assert_right(got, given)
    assert all(map(torch.equal, got.values(), ran(kernels.WAYS[fastest], given).values()))
    assert choosing.timed == 2 * ["steps", "persistent"]
    choosing.start_process()
    again = ran(kernels, given)
    assert all(map(torch.equal, got.values(), again.values()))
    assert choosing.timed == []
    # Forward and backward, each tried and run.
    assert len(choosing.device.launched) == (4 if fastest == "persistent" else 0)


def test_it_is_tried_once_for_each_kind_of_call(choosing):
    for length in (3, 2, 3):
        ran(kernels, operands(length, 5, 13))
    choosing.device.launched.clear()
    ran(kernels, operands(4, 5, 13))
    assert len(choosing.device.launched) == 2
    ran(kernels, operands(4, 5, 13, bias=False))
    assert len(choosing.device.launched) > 4, "another kernel was not tried"


# Each changes a few numbers only, or those of the last block.
WRONG = {
    "a unit's state": (
        "kept[tile].c[half][lane] = cell;",
        "kept[tile].c[half][lane] = at.unit == 12 ? cell * 1.1f : cell;",
    ),
    "a response": ("if (kSaveResponse) response", "if (kSaveResponse && at.unit != 3) response"),
    "a part of dh": ("for (int p = 0; p < kParts; ++p) sum", "for (int p = 1; p < kParts; ++p) sum"),
    "dc_0": ("d_c_0[cell] = dc[n];", "d_c_0[cell] = cell == 7 ? 0.0f : dc[n];"),
}
BROKEN = {
    "a unit's state": r"y \(error .*, c_n \(error .*, cells \(error",
    "a response": r"wrong results: response \(error nan",
    "a part of dh": r"d_gates \(error .*, dh_0 \(error .*, dc_0 \(error",
    "dc_0": r"wrong results: dc_0 \(error [0-9.e-]+, at most [0-9.e-]+ is right\)$",
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_kernel_is_never_used(fault, choosing, tmp_path):
    given = operands(*SIZES)
    choosing.break_line(tmp_path, *WRONG[fault])
    with pytest.warns(
        UserWarning, match=f"step by step, as the persistent recurrence fails: .*{BROKEN[fault]}"
    ) as seen:
        got = ran(kernels, given)
    assert len(seen) == 1, "one warning, for the direction that is wrong"
    assert_right(got, given)
    choosing.device.launched.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran(kernels, given)
    ((expression, _),) = choosing.device.launched
    assert ("forward" in expression) == (fault in ("a part of dh", "dc_0")), "the other direction is right"


def test_a_choice_remembered_from_elsewhere_is_tried_in_every_process(choosing, tmp_path):
    """The file may come from a process with another driver, or be shipped for this kind of GPU."""
    given = operands(*SIZES)
    ran(kernels, given)
    choosing.break_line(tmp_path, *WRONG["a unit's state"])
    choosing.start_process()
    with pytest.warns(UserWarning, match="persistent recurrence fails"):
        got = ran(kernels, given)
    assert choosing.timed == []
    right = ran(steps, given)
    assert all(torch.equal(got[name], right[name]) for name in ("y", "c_n", "gates", "cells", "response"))


def test_one_that_does_not_compile_or_launch_costs_a_warning(choosing, monkeypatch):
    def fail(*_):
        raise RuntimeError("the cooperative launch failed: CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE")

    monkeypatch.setattr(persistent, "_launch", fail)
    given = operands(*SIZES)
    with pytest.warns(UserWarning, match="RuntimeError: .*LAUNCH_TOO_LARGE"):
        got = ran(kernels, given)
    assert all(map(torch.equal, got.values(), ran(steps, given).values()))


def test_a_capture_takes_it_where_it_was_tried_before_and_waits_for_no_trial(choosing, monkeypatch):
    given = operands(*SIZES)
    ran(kernels, given)
    choosing.start_process()
    monkeypatch.setattr(kernels, "capturing", lambda: True)
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, read=read: reads.append(read) or read(*args))
    got = ran(kernels, given)
    assert choosing.device.launched == [], "tried inside of a capture"
    assert not reads
    assert all(map(torch.equal, got.values(), ran(steps, given).values()))
    monkeypatch.setattr(kernels, "capturing", lambda: False)
    ran(kernels, given)
    monkeypatch.setattr(kernels, "capturing", lambda: True)
    choosing.device.launched.clear()
    assert reads, "the trial reads its errors"
    reads.clear()
    ran(kernels, given)
    assert len(choosing.device.launched) == 2
    assert not reads


def test_short_memory_is_no_verdict(choosing, monkeypatch):
    launch = persistent._launch

    def no_memory(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(persistent, "_launch", no_memory)
    given = operands(*SIZES)
    assert kernels._what_is_wrong("forward", (*given[:-2], False, True, True)) is not None
    monkeypatch.setattr(persistent, "_launch", launch)
    assert kernels._what_is_wrong("forward", (*given[:-2], False, True, True)) is None


def test_asked_for_it_is_taken_or_raises(choosing, monkeypatch, tmp_path):
    given = operands(*SIZES)
    with kernels.use("persistent"):
        assert_right(ran(kernels, given), given)
    assert len(choosing.device.launched) == 4
    with kernels.use("steps"):
        assert all(map(torch.equal, ran(kernels, given).values(), ran(steps, given).values()))
    assert choosing.timed == []
    choosing.break_line(tmp_path, *WRONG["a unit's state"])
    choosing.start_process()
    with (
        kernels.use("persistent"),
        pytest.warns(UserWarning, match="persistent recurrence fails"),
        pytest.raises(RuntimeError, match=r"can't be used: wrong results: y \(error"),
    ):
        ran(kernels, given)
    monkeypatch.setattr(persistent, "why_not", lambda *_: "no reason")
    with kernels.use("persistent"), pytest.raises(RuntimeError, match="can't be used: no reason"):
        ran(kernels, given)


def test_steps_are_taken_where_the_tuner_is_off_or_must_not_choose(choosing, monkeypatch):
    given = operands(*SIZES)
    right = ran(steps, given)
    monkeypatch.setenv("STN_FAST_AUTOTUNE", "0")
    assert all(map(torch.equal, ran(kernels, given).values(), right.values()))
    assert choosing.device.launched == []


@pytest.mark.parametrize("shape", [(2, 1, 64), (3, 33, 40)], ids=str)
def test_a_right_kernel_passes_whatever_its_sizes(shape, choosing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ran(kernels, operands(*shape))
    assert list(kernels._tried.values()) == [None, None]


def test_too_few_numbers_to_judge_by_are_left_to_steps(choosing):
    ran(kernels, operands(2, 3, 21))
    assert choosing.timed == []
    with kernels.use("persistent"), pytest.raises(RuntimeError, match="3 examples of 21 hidden units are too few"):
        ran(kernels, operands(2, 3, 21))
