"""gated_lstm beyond the contract of all gated operations: time, states, torch's LSTM, what is kept, misfits."""

import pytest
import torch
from contract import LSTM
from contract_checks import (
    assert_as_good_as_plain_torch,
    assert_same,
    compute,
    drawn_like,
    leaves,
    numbers_saved,
)
from flops import flops_of
from numerics import relative_error

from stn_fast.dispatch import use_backend
from stn_fast.ops import products


@pytest.mark.parametrize(
    "shape", [(3, 2, 5, 257, 3), (2, 67, 5, 251, 2), (1, 5, 3, 4, 2), (9, 1, 3, 4, 2), (2, 3, 130, 8, 40)]
)
@use_backend("cpp")
def test_core_is_right_across_its_tasks_and_threads(shape):
    steps, batch, inputs, hidden, n = shape
    assert_as_good_as_plain_torch(LSTM.problem(steps=steps, batch=batch, inputs=inputs, hidden=hidden, n=n))


@pytest.mark.parametrize("packed", [True, False])
@use_backend("cpp")
def test_core_is_right_with_weights_laid_out_beforehand_and_without(packed, monkeypatch):
    """Large weights; where torch lacks the internal products of oneDNN, its public ones do."""
    if packed and not products.offers_onednn():
        pytest.skip("this torch has no products with packed weights")
    monkeypatch.setattr(products, "offers_onednn", lambda: packed)
    hidden = 370
    assert 8 * hidden**2 > products._LARGE
    assert_as_good_as_plain_torch(LSTM.problem(steps=3, batch=5, inputs=4, hidden=hidden, n=2))


@pytest.mark.parametrize("seed", [1, 4, 7])
@use_backend("cpp")
def test_packed_weights_do_not_make_a_response_of_low_rank_less_accurate(seed):
    assert products._LARGE < 4 * 520**2
    assert_as_good_as_plain_torch(LSTM.problem(steps=3, batch=4, inputs=9, hidden=520, rank=5, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@use_backend("reference")
def test_the_gradient_of_a_cell_that_forgets_nothing_sums_all_steps_in_float32(dtype):
    """Each step adds o · dy to it where c = 0 and f = 1; in 16 bits, what is added is soon less than a digit."""
    steps, problem = 300, LSTM.problem(dtype, steps=300, batch=2, inputs=3, hidden=4, n=1)
    tensors = {name: 0 * tensor for name, tensor in problem.operands.items()}
    bias, c_0 = tensors["from_input.bias"], tensors["c_0"].requires_grad_()
    bias[4:8], bias[12:] = 20, -0.7
    (got,) = torch.autograd.grad(problem.call(*tensors.values())[0], c_0, torch.ones(steps, 2, 4, dtype=dtype))
    o = bias[12:].float().sigmoid().to(dtype)
    assert relative_error(got, steps * o.double().expand(2, 4)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("used", [0, 1, 2], ids=["y", "h_n", "c_n"])
def test_gradients_arrive_through_y_the_last_hidden_and_the_last_cell_state(backend, used, reverse):
    def through_one(results, dtype):
        return [d if i == used else None for i, d in enumerate(drawn_like(results, dtype))]

    problem = LSTM.problem(device=backend, steps=3, batch=4, inputs=5, hidden=6, n=2, reverse=reverse)
    assert_as_good_as_plain_torch(problem, incoming=through_one)


def test_a_sequence_in_two_parts_is_the_sequence_at_once():
    """The state carries everything: values, and gradients across the cut."""
    problem = LSTM.problem(steps=7, batch=3, inputs=5, hidden=6, n=2)

    def in_parts(x, h_0, c_0, *rest):
        first, *state = problem.call(x[:3], h_0, c_0, *rest)
        second, *state = problem.call(x[3:], *state, *rest)
        return torch.cat([first, second]), *state

    assert_same(compute(problem, in_parts), compute(problem, problem.call), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_validation_step_computes_no_weight_gradient(dtype, monkeypatch):
    """Frozen parameters: of the large products only those behind dx and the hidden states may run."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")  # the other's are not counted
    steps, batch, inputs, hidden, n = 8, 32, 48, 40, 3
    problem = LSTM.problem(dtype, steps=steps, batch=batch, inputs=inputs, hidden=hidden, n=n)
    y, *_ = problem.call(*leaves(problem.operands, ["x", "h"]).values())
    found = flops_of(y.sum().backward)
    rows, wide = steps * batch, 4 * hidden
    large = 2 * rows * wide * 2 * (inputs + hidden)
    assert large - 2 * batch * wide * 2 * hidden <= found <= large + 2 * batch * wide * 6 * n


def test_reverse_is_the_flipped_sequence():
    # So small that the library rounds no row otherwise for where it lies.
    sizes = dict(steps=5, batch=3, inputs=4, hidden=6, n=2)
    problem, reverse = (LSTM.problem(**sizes, reverse=reverse) for reverse in (False, True))
    x, *rest = problem.operands.values()
    y, *state = reverse.call(x, *rest)
    flipped, *wanted = problem.call(x.flip(0), *rest)
    assert all(map(torch.equal, (y, *state), (flipped.flip(0), *wanted)))


@pytest.mark.parametrize("wanted", [True, False])
def test_folded_runs_in_the_mode_whose_backward_cudnn_has(wanted, monkeypatch):
    """cuDNN refuses the backward pass of what ran in inference mode; results don't depend on it without dropout."""
    modes, lstm = [], torch._VF.lstm

    def spy(*args, train, **options):
        modes.append(train)
        return lstm(*args, train=train, **options)

    monkeypatch.setattr(torch._VF, "lstm", spy)
    problem = LSTM.problem().shared()
    inputs = leaves(problem.operands, ["h"] if wanted else []).values()
    problem.call(*inputs)
    with torch.no_grad():
        problem.call(*inputs)
    assert modes == [wanted, False]


def test_memory_kept_for_backward_is_what_is_stated():
    """Gates, cells and y, and both responses where a gate's gradient is wanted; nothing without a gradient."""
    problem = LSTM.problem(steps=6, batch=8, hidden=16)
    biases = ("from_input.bias", "from_hidden.bias")  # which themselves are not needed
    operands = sum(tensor.numel() for name, tensor in problem.operands.items() if name not in biases)
    cell = 6 * 8 * 16
    assert sum(numbers_saved(problem, list(problem.operands))) == operands + (4 + 1 + 1 + 8) * cell
    assert sum(numbers_saved(problem, ["x"])) == operands + (4 + 1 + 1) * cell
    assert numbers_saved(problem, []) == []


SMALL = dict(steps=3, batch=4, inputs=5, hidden=7, n=3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.randn(3, 4, 6), r"from_input.weight must be \(28, 6\).*got \(28, 5\)"),
        ("x", torch.randn(4, 5), r"takes x \(T, B, I\).*got x \(4, 5\)"),
        ("x", torch.randn(0, 4, 5), r"at least one time step.*got x \(0, 4, 5\)"),
        ("h_0", torch.randn(3, 7), r"h_0 must be \(4, 7\).*got \(3, 7\)"),
        ("c_0", torch.randn(4, 6), r"c_0 must be \(4, 7\).*got \(4, 6\)"),
        ("from_hidden.weight", torch.randn(28, 6), r"from_hidden.weight must be \(28, 7\).*got \(28, 6\)"),
        ("from_hidden.response_weight", torch.randn(7, 7), r"from_hidden.response_weight must be \(28, 7\)"),
        ("from_input.weight_gate", torch.randn(28, 2), r"from_input.weight_gate must be \(28, 3\)"),
        ("from_hidden.bias_gate", torch.randn(27, 3), r"from_hidden.bias_gate must be \(28, 3\)"),
        ("from_input.bias", torch.randn(1), r"from_input.bias must be \(28,\)"),
        ("h", torch.randn(5, 3), r"h must be \(4, 3\).*got \(5, 3\)"),
        ("h", torch.randn(4, 1, 3), r"h \(B, n\) or \(n,\)"),
        ("h", torch.randn(4, 3, dtype=torch.float64), r"h is torch.float64.*from_input.weight torch.float32"),
        ("from_hidden.weight", torch.randn(28, 7, device="meta"), r"from_hidden.weight is torch.float32 on meta"),
        ("from_hidden.bias", None, r"of both from_input and from_hidden, or none"),
    ],
)  # fmt: skip
def test_misfits_are_named(name, value, message):
    problem = LSTM.problem(**SMALL)
    with pytest.raises(ValueError, match=message):
        problem.call(*(problem.operands | {name: value}).values())


def test_biases_on_one_side_alone_are_refused():
    problem = LSTM.problem(**SMALL)
    without = {name: None for name in problem.operands if name.startswith("from_input.") and "bias" in name}
    with pytest.raises(ValueError, match="of both from_input and from_hidden, or none"):
        problem.call(*(problem.operands | without).values())


def test_whole_numbers_are_refused():
    problem = LSTM.problem(torch.int64)
    with pytest.raises(ValueError, match=r"floating point numbers; got torch.int64"):
        problem.call(*problem.operands.values())
