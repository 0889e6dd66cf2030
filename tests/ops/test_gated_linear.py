"""gated_linear beyond the contract of all gated operations: blocks of rows, positions, what is kept, misfits."""

import pytest
import torch
from contract import LINEAR
from contract_checks import assert_as_good_as_plain_torch, leaves, numbers_saved
from flops import flops_of
from numerics import relative_error

from stn_fast.dispatch import use_backend
from stn_fast.ops import products
from stn_fast.ops.gated_linear import cpu, gated_linear


@pytest.mark.parametrize("shape", [(300, 65, 130, 15), (130, 7, 1030, 40), (1025, 3, 5, 2)])
@use_backend("cpp")
def test_core_is_right_across_its_tiles_and_chunks(shape):
    batch, inputs, outputs, n = shape
    assert_as_good_as_plain_torch(LINEAR.problem(batch=batch, inputs=inputs, outputs=outputs, n=n))


@pytest.mark.parametrize("block", [1, 300, 5000])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("layout", [dict(), dict(outer=3), dict(inner=3), dict(outer=2, inner=5)], ids=str)
@use_backend("cpp")
def test_core_is_right_however_the_rows_fall_into_blocks(monkeypatch, block, layout, rank):
    """Blocks of one example, of part of a turn through the batch and of several turns, adding up across blocks."""
    monkeypatch.setattr(cpu, "_BLOCK", block)
    monkeypatch.setattr(cpu, "row_blocks", counted := _Counted(cpu.row_blocks))
    assert_as_good_as_plain_torch(LINEAR.problem(batch=37, inputs=2, outputs=6, rank=rank, **layout))
    assert max(counted.blocks) > 1 or block >= 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_validation_step_computes_no_weight_gradient(dtype, monkeypatch):
    """Frozen parameters: only the products behind dx may run, and small ones with the gates."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")  # the other's are not counted
    batch, inputs, outputs = 32, 48, 40
    problem = LINEAR.problem(dtype, batch=batch, inputs=inputs, outputs=outputs, n=3)
    (y,) = problem.call(*leaves(problem.operands, ["x", "h"]).values())
    large = 2 * batch * outputs * 2 * inputs
    assert large <= flops_of(y.sum().backward) <= large + 2 * batch * outputs * 4 * 3


class _Counted:
    """A generator function that notes how many items each call gave."""

    def __init__(self, function):
        self.function, self.blocks = function, []

    def __call__(self, *arguments):
        items = list(self.function(*arguments))
        self.blocks.append(len(items))
        return iter(items)


@pytest.mark.parametrize(
    ("outer", "batch", "inner", "most"), [(1, 37, 1, 5), (6, 4, 1, 9), (2, 5, 3, 7), (3, 2, 9, 4), (4, 3, 2, 100)]
)
def test_blocks_cover_every_row_once_and_name_its_example(outer, batch, inner, most):
    covered = []
    for rows, examples, turns in cpu.row_blocks(outer, batch, inner, most):
        expected = [b for _ in range(turns) for b in range(examples.start, examples.stop) for _ in range(inner)]
        assert [m // inner % batch for m in range(rows.start, rows.stop)] == expected
        covered += range(rows.start, rows.stop)
    assert covered == list(range(outer * batch * inner))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [dict(), dict(outer=3, inner=2)], ids=["rows", "positions"])
def test_more_hyperparameters_than_a_kernel_holds_obey_the_2x_rule(device, dtype, bias, layout):
    assert_as_good_as_plain_torch(LINEAR.problem(dtype, device, batch=6, n=33, bias=bias, **layout))


def test_triton_refuses_more_hyperparameters_than_a_kernel_holds():
    problem = LINEAR.problem(device="cuda" if torch.cuda.is_available() else "cpu", n=33)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"at most 32 hyperparameters, and h has 33"):
        problem.call(*problem.operands.values())


@pytest.mark.parametrize("example_dim", [0, 1, 2, -2])
def test_a_row_of_h_applies_to_all_positions_of_its_example(example_dim):
    x = torch.randn(3, 4, 5, 6)
    _, *shared, h = LINEAR.problem(batch=x.shape[example_dim], inputs=6).operands.values()
    got = gated_linear(x, *shared, h, example_dim=example_dim)
    for b, row in enumerate(h):
        one = x.select(example_dim, b)
        assert relative_error(got.select(example_dim, b), gated_linear(one, *shared, row.expand(len(one), -1))) < 1e-6


def test_memory_kept_for_backward_is_one_activation():
    """q = x Rᵀ is all that is stored beside the inputs, and nothing where no gate's gradient is wanted."""
    problem = LINEAR.problem(batch=64, inputs=16, outputs=32)
    operands = sum(t.numel() for t in problem.operands.values()) - 32  # bias itself is not needed
    assert sum(numbers_saved(problem, list(problem.operands))) == operands + 64 * 32
    assert sum(numbers_saved(problem, ["x"])) == operands


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4, 6)), r"x must be \(4, 5\).*got \(4, 6\)"),
        (dict(response_weight=torch.randn(7, 4)), r"response_weight must be \(7, 5\).*got \(7, 4\)"),
        (dict(weight_gate=torch.randn(7, 2)), r"weight_gate must be \(7, 3\)"),
        (dict(bias_gate=torch.randn(6, 3)), r"bias_gate must be \(7, 3\)"),
        (dict(bias=torch.randn(1)), r"bias must be \(7,\)"),
        (dict(h=torch.randn(5, 3)), r"h must be \(4, 3\).*got \(5, 3\)"),
        (dict(h=torch.randn(4, 1, 3)), r"h \(B, n\) or \(n,\)"),
        (dict(h=torch.randn(4, 3, dtype=torch.float64)), r"h is torch.float64.*weight torch.float32"),
        (dict(x=torch.ones(4, 5, dtype=torch.int64)), r"x is torch.int64"),
        (dict(weight=torch.randn(7, 5, device="meta")), r"on cpu.*weight torch.float32 on meta"),
        (dict(response_bias=None), r"together, or none"),
        (dict(example_dim=1), r"example_dim=1 must name a dimension of x"),
        (dict(example_dim=5), r"example_dim=5 must name a dimension of x"),
    ],
)
def test_misfits_are_named(change, message):
    operands = LINEAR.problem(batch=4, inputs=5, outputs=7, n=3).operands
    arguments = operands | dict(x=operands["x"][0, :, 0]) | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_linear(**arguments)
