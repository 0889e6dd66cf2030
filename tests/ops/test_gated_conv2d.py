"""gated_conv2d beyond the contract of all gated operations: geometries, layouts, both ways of the CPU, NaN, misfits."""

import pytest
import torch
import torch.nn.functional as F
from contract import CONV2D
from contract_checks import (
    assert_as_good_as_plain_torch,
    assert_defaults_of_torch_do_not_matter,
    assert_gradients_do_not_depend_on_what_else_is_wanted,
    assert_registration_is_complete,
    assert_same,
    assert_threads_do_not_matter,
    compute,
    leaves,
    numbers_saved,
)
from flops import flops_of

from stn_fast.dispatch import use_backend
from stn_fast.ops.gated_conv2d import cpu, gated_conv2d

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FILTERS_AND_GATES = ("weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate")


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
    "groups": dict(groups=2, inputs=2, outputs=3, padding=1),
    "groups, strided, relu": dict(groups=2, inputs=2, outputs=3, stride=2, relu=True),
    "low rank": dict(rank=3, padding=1),
    "low rank, groups, strided, relu": dict(rank=2, groups=2, inputs=2, outputs=3, stride=2, relu=True),
}


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@use_backend("cpp")
def test_core_obeys_the_2x_rule_in_every_geometry_and_layout(options, large, layout, way):
    size = (19, 17) if large else (7, 9)  # the large ones pass to the library pixel by pixel
    assert_as_good_as_plain_torch(CONV2D.problem(**dict(batch=5, outputs=6, size=size, layout=layout) | options))


@pytest.mark.parametrize("size", [(1, 1), (40, 41)])
@pytest.mark.parametrize("outputs", [1, 257, 300])
@use_backend("cpp")
def test_core_is_right_across_its_tiles(size, outputs, layout, way):
    """One pixel, runs of more than 1024 pixels, one channel, more channels than a task takes."""
    sizes = dict(inputs=2, outputs=outputs, size=size, kernel=1, layout=layout)
    assert_as_good_as_plain_torch(CONV2D.problem(**sizes, relu=True))


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


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_any_gradients_may_be_wanted_either_way(groups, rank, layout, way):
    sizes = dict(inputs=2, outputs=3, groups=groups, rank=rank)
    problem = CONV2D.problem(**sizes, layout=layout, padding=1, relu=groups == 1)
    assert_gradients_do_not_depend_on_what_else_is_wanted(CONV2D, problem)


@pytest.mark.parametrize("wanted", [("x", "h"), FILTERS_AND_GATES, ("h",), ("bias", "bias_gate")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_wanted_convolutions_run(wanted, dtype, way):
    """A validation step makes no weight gradient, a first layer's training step no data gradient."""
    problem = CONV2D.problem(dtype, batch=4, inputs=8, outputs=16, size=(9, 9), padding=1)
    (y,) = problem.call(*leaves(problem.operands, wanted).values())
    counted = flops_of(lambda: y.sum().backward())
    convolution = 2 * 2 * 4 * 81 * 16 * 8 * 9
    convolutions = ("x" in wanted) + ("weight" in wanted)
    gates = 2 * 4 * 16 * 3 * 6
    assert convolutions * convolution <= counted <= convolutions * convolution + gates


@pytest.mark.parametrize("last", [("weight", "response_weight"), ("weight",), ("response_weight",)], ids=str)
def test_filters_may_lie_in_another_layout_than_images(last, backend, way):
    problem = CONV2D.problem(device=backend, padding=1)
    laid = {name: problem.operands[name].contiguous(memory_format=torch.channels_last) for name in last}
    other = problem._replace(operands=problem.operands | laid)
    assert_same(compute(other, problem.call), compute(problem, problem.call), 1e-6)


@pytest.mark.parametrize("size", [(7, 5), (19, 17)])
@use_backend("cpp")
def test_torch_s_default_dtype_and_device_don_t_change_what_the_core_writes(size, layout, way):
    assert_defaults_of_torch_do_not_matter(CONV2D.problem(size=size, layout=layout, padding=1))


def test_the_layout_of_the_result_is_that_of_torch(layout):
    problem = CONV2D.problem(size=(19, 18), layout=layout, padding=1)
    x, weight, *_ = problem.operands.values()
    computed = compute(problem, problem.call, ["x"])
    assert computed["y"].stride() == F.conv2d(x, weight, padding=1).stride()
    assert computed["d_x"].stride() == x.stride()


def test_nan_is_not_rectified_away(backend, layout, way):
    problem = CONV2D.problem(device=backend, layout=layout, padding=1, relu=True)
    problem.operands["x"][1, 2, 3, 3] = float("nan")

    def ones(results, dtype):
        return [torch.ones_like(result) for result in results]

    got, want = (compute(problem, f, ["bias"], incoming=ones) for f in (problem.call, problem.definition))
    assert torch.equal(got["y"].isnan(), want["y"].isnan())
    assert got["y"].isnan().sum() == 9 * 10
    assert torch.equal(got["d_bias"], want["d_bias"])  # counts of where y > 0 or is NaN


@pytest.mark.parametrize("size", [(7, 5), (40, 40)])
@use_backend("cpp")
def test_gate_gradients_do_not_depend_on_the_number_of_threads(size, layout, way):
    problem = CONV2D.problem(batch=9, inputs=3, outputs=20, size=size, layout=layout)
    assert_threads_do_not_matter(CONV2D, problem)


@pytest.mark.parametrize("options", [dict(), dict(groups=2), dict(rank=2)], ids=str)
def test_registration_is_complete_either_way(layout, way, options):
    problem = CONV2D.problem(size=(17, 16), layout=layout, inputs=2, outputs=3, stride=(2, 1), padding=1, **options)
    assert_registration_is_complete(CONV2D, problem)


@pytest.mark.parametrize("relu", [False, True])
def test_memory_kept_for_backward_is_the_response_alone(relu, way):
    """q = conv(x, R), and nothing where no gate's gradient is wanted; ReLU keeps its result, which is there anyway."""
    problem = CONV2D.problem(batch=8, outputs=16, size=(8, 8), padding=1, relu=relu)
    activation = 8 * 16 * 64
    rest = sum(t.numel() for t in problem.operands.values()) - 16 + relu * activation  # bias itself is not needed
    assert sum(numbers_saved(problem, list(problem.operands))) == rest + activation
    assert sum(numbers_saved(problem, ["x"])) == rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(3, 5, 7, 5)), r"x must be \(3, 4, 7, 5\).*got \(3, 5, 7, 5\)"),
        (dict(x=torch.randn(4, 7, 5)), r"takes x \(B, I, H, W\).*got x \(4, 7, 5\)"),
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
        (dict(padding="same", stride=2), r"padding='same' needs stride 1"),
        (dict(dilation=(1, 2, 3)), r"dilation as an int or a pair of them.*got \(1, 2, 3\)"),
    ],
)
def test_misfits_are_named(change, message):
    arguments = CONV2D.problem(outputs=6).operands | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_conv2d(**arguments)
