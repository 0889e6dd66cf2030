"""gated_embedding beyond the contract of all gated operations: padding, sparse gradients, dropout of words, tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import DROPPED, EMBEDDING, scale_of
from contract_checks import (
    assert_as_good_as_plain_torch,
    assert_registration_is_complete,
    assert_same,
    compute,
    leaves,
    numbers_saved,
)
from numerics import relative_error

from stn_fast.dispatch import use_backend
from stn_fast.ops.gated_embedding import fold, gated_embedding, row_scale
from stn_fast.ops.gates import GatedParameters

SMALL = dict(words=9, width=7)


def drawn(device, words):
    """tokens (3, 30) and weight, response_weight, weight_gate and h, which require gradients"""
    tokens = torch.randint(words, (3, 30), generator=torch.Generator().manual_seed(0)).to(device)
    return tokens, list(leaves(EMBEDDING.problem(device=device, words=words, width=7).operands).values())


@pytest.mark.parametrize("shape", [(10_000, 650, 7), (31, 1030, 2)])
@use_backend("cpp")
def test_core_is_right_across_its_tasks(shape):
    words, width, n = shape
    assert_as_good_as_plain_torch(EMBEDDING.problem(words=words, width=width, n=n, outer=7, batch=40, rate=0.3))


@pytest.mark.parametrize("width", [1, 31, 130, 520])
@use_backend("triton")
def test_every_tile_of_the_kernel_is_right(width):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_good_as_plain_torch(EMBEDDING.problem(device=device, words=9, width=width, n=2, outer=3, rate=0.4))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_validation_step_sums_no_rows_of_the_tables(frozen, monkeypatch):
    """Held parameters: neither table gets a gradient, and none is made room for."""
    problem = EMBEDDING.problem(words=5000, width=40, outer=3)
    (e,) = problem.call(*leaves(problem.operands, ["h"] if frozen else None).values())
    largest, zeros_like = [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t, **k: largest.append(t.numel()) or zeros_like(t, **k))
    e.sum().backward()
    assert (max(largest) < 5000) == frozen


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_time_first_and_batch_first_are_the_same(dtype):
    tokens, operands = torch.randint(9, (5, 3), dtype=dtype), EMBEDDING.problem(**SMALL).operands.values()
    e = gated_embedding(tokens, *operands, example_dim=1)
    assert torch.equal(gated_embedding(tokens.T, *operands).transpose(0, 1), e)
    assert e.shape == (5, 3, 7)


def test_the_folded_table_is_a_plain_one_at_one_shared_h():
    problem = EMBEDDING.problem(torch.float64).shared()
    weight, response_weight, weight_gate, h = problem.operands.values()
    table = fold(GatedParameters(weight, None, response_weight, None, weight_gate, None), h)
    assert relative_error(gated_embedding(torch.arange(11), weight, response_weight, weight_gate, h), table) < 1e-14


def test_padding_and_gradients_are_those_of_torch(backend):
    """Without hyperparameters' part, the table is torch.nn.Embedding's."""
    tokens = torch.randint(6, (9, 3), generator=torch.Generator().manual_seed(0)).to(backend)
    problem = EMBEDDING.problem(device=backend, words=6, width=5)
    weight, response, gate, h = leaves(problem.operands).values()
    plain = weight.detach().clone().requires_grad_()
    e = gated_embedding(tokens, weight, response, gate, torch.zeros_like(h), example_dim=1, padding_idx=-2)
    want = F.embedding(tokens, plain, padding_idx=4)
    assert torch.equal(e, want)
    de = torch.randn_like(e)
    got, _ = torch.autograd.grad(e, [weight, response], de)
    assert relative_error(got, torch.autograd.grad(want, plain, de)[0]) < 1e-6
    assert (tokens == 4).any()
    assert not got[4].any()


@pytest.mark.parametrize("rate", [None, 0.4])
def test_sparse_gradients_are_the_dense_ones(backend, rate):
    sparse, dense = (
        EMBEDDING.problem(device=backend, words=50, width=5, outer=3, rate=rate, padding=39, sparse=sparse)
        for sparse in (True, False)
    )
    got, want = (compute(problem, problem.call) for problem in (sparse, dense))
    tables = ("d_weight", "d_response_weight")
    assert [name for name, tensor in got.items() if tensor.is_sparse] == list(tables)
    for name in tables:
        named = got[name].coalesce().indices()[0].tolist()
        assert 39 not in named  # which is among the 9 tokens
        assert 1 < len(named) < 9
    assert_same({name: tensor.to_dense() for name, tensor in got.items()}, want, 1e-6)


def test_a_sparse_optimizer_takes_the_sparse_gradients():
    tokens, floats = torch.randint(50, (3, 3)), list(leaves(EMBEDDING.problem(words=50).operands).values())
    before = floats[0].detach().clone()
    gated_embedding(tokens, *floats, example_dim=1, sparse=True).sum().backward()
    torch.optim.SparseAdam(floats[:2], lr=0.1).step()
    moved = (floats[0] != before).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted(set(tokens.flatten().tolist()))


def test_a_sparse_operation_is_registered_too(backend):
    problem = EMBEDDING.problem(device=backend, outer=2, padding=3, rate=0.3, sparse=True, **SMALL)
    assert_registration_is_complete(EMBEDDING, problem)


def test_a_dropped_word_is_dropped_everywhere_and_its_gradients_with_it(backend):
    """The same rows forward and backward, which draws them again; what is left is scaled up."""
    tokens, operands = drawn(backend, words=40)
    scale = scale_of(40, 0.4).to(backend, torch.float32)
    e = gated_embedding(tokens, *operands, rate=torch.tensor([0.4], device=backend), **DROPPED)
    assert 0 < (scale == 0).sum() < 40
    assert torch.equal((e == 0).all(-1), scale[tokens] == 0)
    assert relative_error(e, gated_embedding(tokens, *operands) * scale[tokens][..., None]) < 1e-6
    for gradient in torch.autograd.grad(e.sum(), operands[:2]):
        assert not gradient[scale == 0].any()
        assert (gradient[scale > 0][:, 0] != 0).any()


def test_a_dropped_row_is_zero_whatever_it_holds(backend):
    tokens, (weight, *rest) = drawn(backend, words=4)
    weight = torch.full_like(weight, math.inf)
    assert not gated_embedding(tokens, weight, *rest, rate=torch.ones(1, device=backend), **DROPPED).any()


def test_a_dropped_row_has_no_part_in_any_gradient_whatever_it_holds(backend):
    problem = EMBEDDING.problem(device=backend, words=40, width=6, outer=30, batch=4, rate=0.4)
    dropped = (scale_of(40, 0.4) == 0).to(backend)[:, None]
    got, want = (
        problem.operands | {"response_weight": problem.operands["response_weight"].masked_fill(dropped, value)}
        for value in (math.inf, 0)
    )
    assert_same(*(compute(problem._replace(operands=operands), problem.call) for operands in (got, want)))


def test_words_are_dropped_at_the_rate_and_afresh_at_every_step():
    rate = torch.tensor([0.3])
    scales = [row_scale(20_000, rate, torch.tensor(step), 0, 1) for step in range(2)]
    assert torch.equal(scales[0].unique(), torch.tensor([0, 1 / 0.7]))
    assert (scales[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(*scales)


def test_the_mask_is_not_stored():
    problem = EMBEDDING.problem(words=300, outer=3, batch=5, rate=0.5)
    operands = [tensor.numel() for name, tensor in problem.operands.items() if name != "weight"]
    assert sorted(numbers_saved(problem, list(problem.operands))) == sorted([15, *operands, 1, 1])  # rate and step


@pytest.mark.parametrize("token", [9, -1, 2**31])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device stops, and every later test with it")
def test_the_kernel_reads_nothing_outside_of_the_table_and_says_so(token):
    from stn_fast.kernels import gated_embedding as kernels

    tokens, rest = drawn("cpu", words=9)
    tokens[0, 1] = token
    with pytest.raises(RuntimeError, match="a token is outside of the table"):
        kernels.forward(tokens.flatten(), *rest, None, 1, 30)


@pytest.mark.parametrize("token", [9, -1, 2**31])
def test_a_token_outside_of_the_table_is_named(token):
    tokens, rest = drawn("cpu", words=9)
    tokens[0, 1] = token
    with pytest.raises(IndexError, match=rf"9 rows, so tokens are 0 to 8; got {token}"):
        gated_embedding(tokens, *rest)


@pytest.mark.parametrize("wanted", [None, []], ids=["gradients", "none"])
def test_autocast_leaves_every_backend_alone(backend, wanted):
    """The core is given addresses, so a product in 16 bits would be misread."""
    problem = EMBEDDING.problem(device=backend, words=9, width=130, outer=4, batch=5)
    want = compute(problem, problem.call, wanted)
    with torch.autocast(backend, dtype=torch.bfloat16):
        assert_same(compute(problem, problem.call, wanted), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=torch.zeros(4, 2)), r"tokens as int64 or int32.*got \(4, 2\) torch.float32"),
        (dict(tokens=torch.tensor(1)), r"at least one dimension"),
        (dict(weight=torch.randn(9)), r"weight \(V, D\)"),
        (dict(response_weight=torch.randn(8, 7)), r"response_weight must be \(9, 7\).*got \(8, 7\)"),
        (dict(weight_gate=torch.randn(7, 2)), r"weight_gate must be \(7, 3\)"),
        (dict(h=torch.randn(5, 3)), r"h must be \(3, 3\).*got \(5, 3\)"),
        (dict(h=torch.randn(3, 3, dtype=torch.float64)), r"h is torch.float64.*weight torch.float32"),
        (dict(example_dim=3), r"example_dim=3 is no dimension of tokens \(1, 3, 1\)"),
        (dict(padding_idx=9), r"padding_idx=9 is no row of weight \(9, 7\)"),
        (dict(rate=torch.tensor(0.5)), r"rate \(1,\) float32.*got \(\)"),
        (dict(rate=torch.tensor([0.5], requires_grad=True)), r"requires_grad=True"),
        (dict(rate=torch.tensor([0.5]), stream=0), r"stream must be an int >= 1"),
    ],
)
def test_misfits_are_named(change, message):
    tokens, operands = torch.zeros(1, 3, 1, dtype=torch.int64), EMBEDDING.problem(**SMALL).operands
    arguments = operands | dict(tokens=tokens, example_dim=1) | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_embedding(**arguments)
