"""Gated linear kernels, every way to compute them, against plain torch in float64."""

import math
import os

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_linear as kernels
from stn_fast.kernels import matmul
from stn_fast.kernels.autotune import Autotuner
from stn_fast.kernels.gates import gate_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate", "h")
EVERYTHING = (True,) * 8
# batch, inputs, outputs, n, outer, inner
SHAPES = [
    (13, 17, 23, 5, 1, 1),
    (3, 67, 131, 17, 3, 2),
    (70, 64, 32, 15, 1, 1),
    (2, 5, 3, 2, 7, 11),
]
CONFIGS = {
    matmul.config_name(config): config
    for config in [
        *matmul.HOPPER_CONFIGS,
        *matmul.AMPERE_CONFIGS,
        *matmul.UNALIGNED_CONFIGS,
        *matmul.FLOAT32_CONFIGS,
    ]
}
SMALL = matmul.FLOAT32_CONFIGS[-1]


def runs_here(config, dtype):
    """On a GPU a configuration runs in the dtype and on the chip it's made for; the interpreter runs all of them."""
    if DEVICE == "cpu":
        return True
    capability = torch.cuda.get_device_capability()
    return any(config in matmul.configs(dtype, aligned, capability) for aligned in (True, False))


def operands(batch, inputs, outputs, n, outer, inner, dtype, bias=True):
    """The eight tensors in the order of NAMES and dy, on the CPU, drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(batch + inputs + outputs)
    rows = outer * batch * inner
    shapes = [(rows, inputs), (outputs, inputs), (outputs,), (outputs, inputs), (outputs,), (outputs, n), (outputs, n)]
    shapes += [(batch, n), (rows, outputs)]
    *tensors, dy = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    if not bias:
        tensors[2] = tensors[4] = tensors[6] = None
    return tensors, dy


def plain(tensors, outer, inner):
    """y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r, every product written out."""
    x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h = tensors
    i_example = torch.arange(x.shape[0]) // inner % h.shape[0]
    y = x @ weight.T + (h @ weight_gate.T)[i_example] * (x @ response_weight.T)
    return y if bias is None else y + bias + ((h @ bias_gate.T) * response_bias)[i_example]


def plain_gradients(tensors, dy, outer, inner, dtype):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(plain(leaves, outer, inner), given, dy.to(dtype)))
    return [None if leaf is None else next(gradients) for leaf in leaves]


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def assert_forward(tensors, outer, inner, config, save_response=True):
    y, q = kernels.forward(*on_device(*tensors), outer, inner, save_response, config=config)
    exact = [None if t is None else t.double() for t in tensors]
    assert_twice_as_good(y, plain(tensors, outer, inner), plain(exact, outer, inner))
    if not save_response:
        assert q is None
        return
    assert_twice_as_good(q, tensors[0] @ tensors[3].T, exact[0] @ exact[3].T, "q")


def assert_gradients(tensors, dy, outer, inner, config, wanted=EVERYTHING):
    x, weight, _, response_weight, response_bias, weight_gate, bias_gate, h = on_device(*tensors)
    q = x @ response_weight.T if wanted[5] or wanted[7] else x.new_empty(0)
    *got, d_projection, dh = kernels.backward(
        dy.to(DEVICE), x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q,
        outer, inner, (*wanted[:-1], False, wanted[-1]), config=config,
    )  # fmt: skip
    assert d_projection is None
    got.append(dh)
    in_dtype, exact = (plain_gradients(tensors, dy, outer, inner, dtype) for dtype in (dy.dtype, torch.float64))
    for name, wants, gradient, *references in zip(NAMES, wanted, got, in_dtype, exact, strict=True):
        assert (gradient is not None) == wants, name
        if wants:
            assert gradient.dtype == dy.dtype
            assert_twice_as_good(gradient, *references, name=name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", ["library", "fused"])
def test_every_shape_obeys_the_2x_rule(config, shape, dtype, bias):
    tensors, dy = operands(*shape, dtype, bias)
    config = config if config == "library" else SMALL
    wanted = EVERYTHING if bias else (True, True, False, True, False, True, False, True)
    assert_forward(tensors, *shape[4:], config)
    assert_gradients(tensors, dy, *shape[4:], config, wanted)


# Sizes that leave every tile part-filled, and sizes that fill them. The latter are interpreted in float32 alone: other
# dtypes differ in rounding only. For a GPU, also where its compilations are counted, they are other kernels.
PART_FILLED, FILLED = (65, 67, 131, 3, 1, 2), (33, 64, 128, 15, 2, 1)
COMPILED = torch.cuda.is_available() or "COMPILATIONS" in os.environ


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(PART_FILLED, dtype) for dtype in DTYPES] + [(FILLED, dtype) for dtype in (DTYPES if COMPILED else DTYPES[:1])],
    ids=str,
)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_obeys_the_2x_rule(config, shape, dtype):
    if not runs_here(CONFIGS[config], dtype):
        config = matmul.configs(dtype, False, torch.cuda.get_device_capability())[0]
    tensors, dy = operands(*shape, dtype)
    config = CONFIGS[config] if isinstance(config, str) else config
    assert_forward(tensors, *shape[4:], config)
    assert_gradients(tensors, dy, *shape[4:], config, (True, True, *[False] * 1, True, *[False] * 4))


ONES = [(1, 1, 1, 1, 1, 1), (1, 1, 37, 1, 1, 1), (29, 3, 1, 1, 1, 1), (1, 2, 3, 1, 5, 1)]


@pytest.mark.parametrize("shape", ONES, ids=str)
@pytest.mark.parametrize("config", ["library", "fused"])
def test_sizes_of_one_are_right(config, shape):
    """In float32: of two 16-bit results of a few numbers, either may be by far the closer by chance."""
    tensors, dy = operands(*shape, torch.float32)
    config = config if config == "library" else SMALL
    assert_forward(tensors, *shape[4:], config)
    assert_gradients(tensors, dy, *shape[4:], config)


def test_more_hyperparameters_than_a_kernel_holds_are_refused():
    tensors, dy = operands(5, 7, 6, kernels.MAX_N + 1, 1, 1, torch.float32)
    with pytest.raises(ValueError, match="at most 32 hyperparameters; got 33"):
        kernels.forward(*on_device(*tensors), 1, 1, False)
    with pytest.raises(ValueError, match="at most 32 hyperparameters; got 33"):
        assert_gradients(tensors, dy, 1, 1, "library")


def test_no_configuration_ships_for_hyperparameters_that_none_is_compiled_for():
    for n, n_pad in ((1, 16), (17, 32), (kernels.MAX_N, 32)):
        tensors, _ = operands(2, 3, 4, n, 1, 1, torch.float32)
        problem = kernels._Problem(tensors[0], tensors[1], tensors[7], 1)
        assert problem.configs
        assert problem.options["N_PAD"] == n_pad


def test_float64_is_refused():
    tensors, _ = operands(5, 7, 6, 3, 1, 1, torch.float64)
    with pytest.raises(TypeError, match="x is float64"):
        kernels.forward(*on_device(*tensors), 1, 1, False)


def test_large_tiles_that_do_not_fit_a_device_leave_the_smallest(monkeypatch, tmp_path):
    """The autotuner falls back to its default where that is infinite, so the default has to fit."""
    times, tiles = [], [matmul.config_name(config) for config in matmul.FLOAT32_CONFIGS]

    def timer(candidate):
        is_tile = candidate.args[-1] in tiles
        times.append(math.inf if is_tile and candidate.args[-1] != matmul.config_name(SMALL) else 1.0)
        return times[-1]

    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels, "tuner", Autotuner(timer, tmp_path / "autotune.json"))
    tensors, dy = operands(5, 7, 6, 3, 1, 1, torch.float32)
    assert_gradients(tensors, dy, 1, 1, None)
    timed = len(times)
    assert math.inf in times
    assert_gradients(tensors, dy, 1, 1, None)
    assert len(times) == timed


def test_a_trial_that_runs_out_of_memory_leaves_nothing_in_the_result(monkeypatch, tmp_path):
    """Of all trials of a validation step's backward, the last one that was to use a buffer of its own for g fails."""
    failed = []
    compute = kernels._Backward.dx

    def dx(run, name):
        if run.g is not None and name != "library":
            failed.append(name)
            raise torch.OutOfMemoryError("simulated")
        return compute(run, name)

    def timer(candidate):
        try:
            candidate()
        except torch.OutOfMemoryError:
            return math.inf
        return 1.0

    monkeypatch.delenv("STN_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(kernels._Backward, "dx", dx)
    monkeypatch.setattr(kernels, "tuner", Autotuner(timer, tmp_path / "autotune.json"))
    tensors, dy = operands(5, 7, 6, 3, 1, 1, torch.float32)
    assert_gradients(tensors, dy, 1, 1, None, (True, *[False] * 6, True))
    assert failed


SUBSETS = [
    *(tuple(i == one for i in range(8)) for one in range(8)),
    *(tuple(i != one for i in range(8)) for one in range(8)),
    (False,) * 8,
    (True, *[False] * 6, True),  # a validation step
    (False, *[True] * 6, False),  # the first layer in a training step
]


@pytest.mark.parametrize("ways", ["library", "fused", "library for dx", "library for dw"])
def test_only_wanted_gradients_are_computed_and_right(ways):
    configs = {"fused": SMALL, "library for dx": ("library", SMALL), "library for dw": (SMALL, "library")}
    config = configs.get(ways, "library")
    shape = (5, 7, 6, 3, 2, 2)
    tensors, dy = operands(*shape, torch.float32)
    for wanted in SUBSETS:
        assert_gradients(tensors, dy, *shape[4:], config, wanted)


@pytest.mark.parametrize("config", ["library", "fused"])
def test_response_is_saved_only_when_asked_for(config):
    tensors, _ = operands(5, 7, 6, 3, 1, 1, torch.float32)
    assert_forward(tensors, 1, 1, config if config == "library" else SMALL, save_response=False)


def test_reductions_are_split_and_still_right():
    """Many rows by few outputs, and few rows by many outputs: both reductions take several programs."""
    for shape in ((1100, 3, 5, 4, 1, 1), (3, 3, 700, 4, 1, 1)):  # more partial sums than are added at once
        tensors, dy = operands(*shape, torch.float32)
        wanted = (False, False, True, False, True, True, True, True)
        assert_gradients(tensors, dy, 1, 1, "library", wanted)


@pytest.mark.parametrize("shape", [(0, 7, 6, 3, 1, 1), (5, 7, 0, 3, 1, 1)], ids=["no rows", "no outputs"])
@pytest.mark.parametrize("config", ["library", "fused"])
def test_sums_over_nothing_are_zero(config, shape):
    """The matrix kernels assume that there is something to sum."""
    tensors, dy = operands(*shape, torch.float32)
    for wanted in ((True, True, False, True, *[False] * 4), EVERYTHING, (True, *[False] * 6, True)):
        assert_gradients(tensors, dy, 1, 1, config if config == "library" else SMALL, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 17])
def test_gate_tables_are_those_of_the_definition(n, dtype):
    tensors, _ = operands(37, 5, 67, n, 1, 1, dtype)
    _, _, bias, _, response_bias, weight_gate, bias_gate, h = tensors
    got = gate_tables(*on_device(h, weight_gate, bias, response_bias, bias_gate), "ieee", dtype)

    def expected(h, weight_gate, bias, response_bias, bias_gate):
        return h @ weight_gate.T, bias + (h @ bias_gate.T) * response_bias

    given = (h, weight_gate, bias, response_bias, bias_gate)
    exact = expected(*(t.double() for t in given))
    for name, *tables in zip(("scale", "shift"), got, expected(*given), exact, strict=True):
        assert tables[0].dtype == dtype
        assert_twice_as_good(*tables, name)
    scale, shift = gate_tables(*on_device(h, weight_gate, None, None, None), "ieee", dtype)
    assert shift is None
    assert torch.equal(scale, got[0])


def test_an_unknown_configuration_is_named_with_the_known_ones():
    tensors, _ = operands(5, 7, 6, 3, 1, 1, torch.float32)
    with pytest.raises(ValueError, match=r"config='fastest' is none of \['library', '32x64x16-w4-s3'"):
        kernels.forward(*on_device(*tensors), 1, 1, False, config="fastest")
