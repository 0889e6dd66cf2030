"""gated_embedding against its definition, gradient by gradient; padding, sparse gradients and dropout of words."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error, taking_tables

from stn_fast import random
from stn_fast.dispatch import use_backend
from stn_fast.ops import gated_embedding as operation
from stn_fast.ops.gated_embedding import gated_embedding, row_scale

reference, fold = taking_tables(operation.reference), taking_tables(operation.fold)
NAMES = ("weight", "response_weight", "weight_gate", "h")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DROPPED = dict(seed=2**40 + 3, step=4, stream=2)
property_test = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def operands(words, width, n, *, outer=1, batch=3, inner=1, dtype=torch.float32, device="cpu", seed=0):
    """tokens (outer, batch, inner), then weight, response_weight, weight_gate, h, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(words, (outer, batch, inner), generator=generator) if words else torch.empty(outer, batch, 0)
    shapes = (words, width), (words, width), (width, n), (batch, n)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes]
    return [tokens.long().to(device), *drawn]


def scale_of(words, rate):
    """Row scales by the NumPy generator."""
    uniform = torch.from_numpy(random.uniform(DROPPED["seed"], DROPPED["step"], DROPPED["stream"], 1, words))[0]
    return torch.where(uniform >= rate, 1 / (1 - rate), 0).to(torch.float64)


def apply(function, tensors, rate=None, padding=None):
    """`function` is gated_embedding or reference; both on tokens (outer, batch, inner)."""
    tokens, *rest = tensors
    if function is gated_embedding:
        dropped = {} if rate is None else dict(DROPPED, rate=torch.tensor([rate], device=tokens.device))
        return gated_embedding(tokens, *rest, example_dim=1, padding_idx=padding, **dropped)
    scale = None if rate is None else scale_of(len(rest[0]), rate).to(tokens.device)
    outer, _, inner = tokens.shape
    e = reference(tokens.flatten(), *rest, scale, outer, inner, -1 if padding is None else padding)
    return e.view(*tokens.shape, -1)


def leaves(tensors, dtype=None, wanted=(True,) * 4):
    tokens, *floats = tensors
    return [tokens, *(t.detach().to(dtype or t.dtype).requires_grad_(w) for t, w in zip(floats, wanted, strict=True))]


def gradients(function, tensors, dy, **options):
    asked = [t for t in tensors[1:] if t.requires_grad]
    return torch.autograd.grad(apply(function, tensors, **options), asked, dy.to(asked[0].dtype))


def assert_as_good_as_plain_torch(tensors, wanted=(True,) * 4, **options):
    """Output and every wanted gradient, by the 2x rule."""
    exact, plain, ours = (leaves(tensors, d, wanted) for d in (torch.float64, None, None))
    exact_e = apply(reference, exact, **options)
    assert_twice_as_good(apply(gated_embedding, ours, **options), apply(reference, plain, **options), exact_e)
    if not any(wanted):
        return
    dtype = tensors[1].dtype
    de = torch.randn(exact_e.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    de = de.to(exact_e.device, dtype)
    for name, *three in zip(
        [name for name, wants in zip(NAMES, wanted, strict=True) if wants],
        gradients(gated_embedding, ours, de, **options),
        gradients(reference, plain, de, **options),
        gradients(reference, exact, de.double(), **options),
        strict=True,
    ):
        assert three[0].dtype == dtype
        assert_twice_as_good(*three, name=name)


@property_test
@given(
    words=st.integers(1, 90), width=st.integers(1, 130), n=st.integers(1, 9), outer=st.integers(1, 7),
    batch=st.integers(1, 7), inner=st.integers(1, 4), rate=st.sampled_from([None, 0.0, 0.5, 0.95]),
    padding=st.sampled_from([None, 0]),
)  # fmt: skip
@use_backend("cpp")
def test_core_is_as_exact_as_plain_torch(words, width, n, outer, batch, inner, rate, padding):
    tensors = operands(words, width, n, outer=outer, batch=batch, inner=inner)
    assert_as_good_as_plain_torch(tensors, rate=rate, padding=padding)


@pytest.mark.parametrize("shape", [(10_000, 650, 7), (31, 1030, 2)])
@use_backend("cpp")
def test_core_is_right_across_its_tasks(shape):
    assert_as_good_as_plain_torch(operands(*shape, outer=7, batch=40), rate=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rate", [None, 0.4])
@pytest.mark.parametrize("layout", [dict(), dict(outer=5), dict(inner=4), dict(outer=3, inner=2)], ids=str)
def test_every_backend_and_dtype_obeys_the_2x_rule(backend, dtype, rate, layout):
    assert_as_good_as_plain_torch(operands(11, 37, 3, dtype=dtype, device=backend, **layout), rate=rate, padding=2)


@pytest.mark.parametrize("width", [1, 31, 130, 520])
@use_backend("triton")
def test_every_tile_of_the_kernel_is_right(width):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_as_good_as_plain_torch(operands(9, width, 2, outer=3, device=device), rate=0.4)


def test_more_hyperparameters_than_a_kernel_of_matrices_holds(backend):
    assert_as_good_as_plain_torch(operands(9, 20, 70, outer=3, device=backend))


def test_float64_is_exact(device):
    tensors = operands(9, 7, 3, outer=2, dtype=torch.float64, device=device)
    assert relative_error(apply(gated_embedding, tensors), apply(reference, tensors)) < 1e-15


@pytest.mark.parametrize("rate", [None, 0.5])
def test_every_gradient_of_the_reference_matches_finite_differences(rate):
    tokens, *floats = leaves(operands(5, 4, 2, outer=2, inner=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *f: apply(reference, [tokens, *f], rate), floats)


def test_every_subset_of_wanted_gradients_is_right(backend):
    tensors = operands(6, 5, 3, outer=2, device=backend)
    for wanted in itertools.product([False, True], repeat=4):
        assert_as_good_as_plain_torch(tensors, wanted, rate=0.3)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_validation_step_sums_no_rows_of_the_tables(frozen, monkeypatch):
    """Held parameters: neither table gets a gradient, and none is made room for."""
    tensors = leaves(operands(5000, 40, 3, outer=2), wanted=(False, False, False, True) if frozen else (True,) * 4)
    e, largest, zeros_like = apply(gated_embedding, tensors), [], torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda t, **k: largest.append(t.numel()) or zeros_like(t, **k))
    e.sum().backward()
    assert (max(largest) < 5000) == frozen


@pytest.mark.parametrize("empty", ["positions", "width"])
def test_empty_sizes_give_empty_or_zero_results(backend, empty):
    sizes = dict(words=4, width=5, n=2, outer=2) | ({"outer": 0} if empty == "positions" else {"width": 0})
    tensors = leaves(operands(**sizes, device=backend))
    e = apply(gated_embedding, tensors)
    assert e.shape == (*tensors[0].shape, sizes["width"])
    assert not any(g.any() for g in torch.autograd.grad(e.sum(), tensors[1:]))


def test_non_contiguous_inputs_and_gradients(backend):
    tensors = operands(9, 7, 3, outer=4, inner=2, device=backend)
    twisted = leaves([t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors])
    want = apply(gated_embedding, tensors)
    assert torch.equal(apply(gated_embedding, twisted), want)
    expanded = torch.ones((), device=backend).expand_as(want)
    for got, wish in zip(
        gradients(gated_embedding, twisted, expanded),
        gradients(gated_embedding, leaves(tensors), expanded),
        strict=True,
    ):
        assert torch.equal(got, wish)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_time_first_and_batch_first_are_the_same(dtype):
    tokens, *rest = operands(9, 7, 3, outer=5, batch=4)
    time_first = tokens[..., 0].to(dtype)
    e = gated_embedding(time_first, *rest, example_dim=1)
    assert torch.equal(gated_embedding(time_first.T, *rest).transpose(0, 1), e)
    assert e.shape == (5, 4, 7)


def test_one_h_for_all_is_the_same_h_for_each(backend):
    tokens, *floats = operands(9, 7, 3, outer=5, batch=4, device=backend)
    *tables, h = floats
    shared = h[0].clone().requires_grad_()
    each = h[:1].clone().requires_grad_()
    results = [
        gated_embedding(tokens, *tables, shared, example_dim=1),
        gated_embedding(tokens, *tables, each.expand(4, -1), example_dim=1),
    ]
    assert relative_error(*results) < 1e-6
    got, want = (
        torch.autograd.grad(e.square().sum(), leaf)[0] for e, leaf in zip(results, (shared, each), strict=True)
    )
    assert relative_error(got, want[0]) < 1e-5
    plain = torch.nn.functional.embedding(tokens, fold(*tables, h[0]))
    assert relative_error(results[0], plain) < 1e-6


def test_padding_and_gradients_are_those_of_torch(backend):
    """Without hyperparameters' part, the table is torch.nn.Embedding's."""
    tokens, weight, response, gate, h = leaves(operands(6, 5, 2, outer=9, device=backend))
    plain = weight.detach().clone().requires_grad_()
    e = gated_embedding(tokens, weight, response, gate, torch.zeros_like(h), example_dim=1, padding_idx=-2)
    want = torch.nn.functional.embedding(tokens, plain, padding_idx=4)
    assert torch.equal(e, want)
    de = torch.randn_like(e)
    got, _ = torch.autograd.grad(e, [weight, response], de)
    assert relative_error(got, torch.autograd.grad(want, plain, de)[0]) < 1e-6
    assert (tokens == 4).any()
    assert not got[4].any()


@pytest.mark.parametrize("rate", [None, 0.4])
def test_sparse_gradients_are_the_dense_ones(backend, rate):
    tensors = leaves(operands(50, 5, 2, outer=3, device=backend))
    tokens, *floats = tensors
    dropped = {} if rate is None else dict(DROPPED, rate=torch.tensor([rate], device=backend))
    e = gated_embedding(tokens, *floats, example_dim=1, padding_idx=3, sparse=True, **dropped)
    de = torch.randn_like(e)
    sparse = torch.autograd.grad(e, floats, de)
    dense = gradients(gated_embedding, tensors, de, rate=rate, padding=3)
    assert [g.is_sparse for g in sparse] == [True, True, False, False]
    assert all(set(g.coalesce().indices()[0].tolist()) <= set(tokens.flatten().tolist()) - {3} for g in sparse[:2])
    for got, want in zip(sparse, dense, strict=True):
        assert relative_error(got.to_dense(), want) < 1e-6


def test_a_sparse_optimizer_takes_the_sparse_gradients():
    tokens, *floats = leaves(operands(50, 5, 2, outer=3))
    before = floats[0].detach().clone()
    gated_embedding(tokens, *floats, example_dim=1, sparse=True).sum().backward()
    torch.optim.SparseAdam(floats[:2], lr=0.1).step()
    moved = (floats[0] != before).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted(set(tokens.flatten().tolist()))


def test_a_dropped_word_is_dropped_everywhere_and_its_gradients_with_it(backend):
    """The same rows forward and backward, which draws them again; what is left is scaled up."""
    tensors = leaves(operands(40, 6, 3, outer=30, batch=4, device=backend))
    tokens = tensors[0]
    scale = scale_of(40, 0.4).to(backend, torch.float32)
    e = apply(gated_embedding, tensors, rate=0.4)
    assert 0 < (scale == 0).sum() < 40
    assert torch.equal((e == 0).all(-1), scale[tokens] == 0)
    assert relative_error(e, apply(gated_embedding, tensors) * scale[tokens][..., None]) < 1e-6
    for gradient in torch.autograd.grad(e.sum(), tensors[1:3]):
        assert not gradient[scale == 0].any()
        assert (gradient[scale > 0][:, 0] != 0).any()


def test_a_dropped_row_is_zero_whatever_it_holds(backend):
    tokens, weight, *rest = operands(4, 3, 2, device=backend)
    weight = torch.full_like(weight, math.inf)
    e = gated_embedding(tokens, weight, *rest, example_dim=1, rate=torch.ones(1, device=backend), **DROPPED)
    assert not e.any()


def test_a_dropped_row_has_no_part_in_any_gradient_whatever_it_holds(backend):
    tokens, weight, response, *rest = operands(40, 6, 3, outer=30, batch=4, device=backend)
    dropped = (scale_of(40, 0.4) == 0).to(backend)
    held = [response.masked_fill(dropped[:, None], value) for value in (math.inf, 0)]
    de = torch.randn(30, 4, 1, 6, device=backend)
    got, want = (gradients(gated_embedding, leaves([tokens, weight, r, *rest]), de, rate=0.4) for r in held)
    assert all(map(torch.equal, got, want))


def test_words_are_dropped_at_the_rate_and_afresh_at_every_step():
    rate = torch.tensor([0.3])
    scales = [row_scale(20_000, rate, torch.tensor(step), 0, 1) for step in range(2)]
    assert torch.equal(scales[0].unique(), torch.tensor([0, 1 / 0.7]))
    assert (scales[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(*scales)


def test_the_mask_is_not_stored():
    saved = []
    tokens, *floats = leaves(operands(300, 5, 2, outer=3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        gated_embedding(tokens, *floats, example_dim=1, rate=torch.tensor([0.5]), **DROPPED)
    assert sorted(saved) == sorted([tokens.numel(), *(t.numel() for t in floats[1:]), 1, 1])  # rate and step


@use_backend("cpp")
def test_results_do_not_depend_on_the_number_of_threads():
    tensors, before, results = operands(300, 130, 7, outer=40, batch=9), torch.get_num_threads(), []
    tensors[3:] = [t.round() for t in tensors[3:]]  # the library's product of both, which may depend on them, is exact
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            e = apply(gated_embedding, ours := leaves(tensors), rate=0.2)
            results.append([e, *torch.autograd.grad(e, ours[1:3], torch.ones_like(e))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@pytest.mark.parametrize("token", [9, -1, 2**31])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device stops, and every later test with it")
def test_the_kernel_reads_nothing_outside_of_the_table_and_says_so(token):
    from stn_fast.kernels import gated_embedding as kernels

    tokens, *rest = operands(9, 7, 3)
    tokens[0, 1] = token
    with pytest.raises(RuntimeError, match="a token is outside of the table"):
        kernels.forward(tokens.flatten(), *rest, None, 1, 1)


@pytest.mark.parametrize("token", [9, -1, 2**31])
def test_a_token_outside_of_the_table_is_named(token):
    tokens, *rest = operands(9, 7, 3)
    tokens[0, 1] = token
    with pytest.raises(IndexError, match=rf"9 rows, so tokens are 0 to 8; got {token}"):
        gated_embedding(tokens, *rest, example_dim=1)


def test_forward_mode_tangent_is_not_silently_zero(device):
    tokens, *primals = operands(9, 7, 3, outer=2, dtype=torch.float64, device=device)
    tangents = [torch.randn_like(t) for t in primals]

    def of_floats(*floats):
        return apply(gated_embedding, [tokens, *floats], rate=0.3)

    _, got = torch.func.jvp(of_floats, tuple(primals), tuple(tangents))
    step = 1e-6
    ahead = of_floats(*(p + step * t for p, t in zip(primals, tangents, strict=True)))
    behind = of_floats(*(p - step * t for p, t in zip(primals, tangents, strict=True)))
    assert relative_error(got, (ahead - behind) / (2 * step)) < 1e-7


def test_second_derivatives_in_reverse_mode_raise_instead_of_lying():
    tensors = leaves(operands(9, 7, 3))
    first = torch.autograd.grad(apply(gated_embedding, tensors).square().sum(), tensors[1:], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first[0].sum(), tensors[4], allow_unused=True)


def test_registration_is_complete(backend):
    tokens, *floats = leaves(operands(9, 7, 3, outer=2, device=backend))
    draw = (torch.tensor([0.3], device=backend), torch.tensor(4, device=backend), 5, 2)
    weight, response_weight, weight_gate, h = floats
    six = (weight, None, response_weight, None, weight_gate, None)
    arguments = (tokens.flatten(), *six, h, *draw, 2, 1, 3, False)
    torch.library.opcheck(torch.ops.stn_fast.gated_embedding.default, arguments)
    de = torch.randn(6, 7, device=backend)
    wanted = [t is not None for t in (*six, h)]
    detached = [None if t is None or t is weight else t.detach() for t in (*six, h)]
    for sparse in (False, True):
        torch.library.opcheck(
            torch.ops.stn_fast.gated_embedding_backward.default,
            (de, tokens.flatten(), *detached, *draw, 2, 1, 3, sparse, wanted),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_without_graph_break_to_the_same_numbers():
    tensors = leaves(operands(9, 7, 3, outer=2))
    rate, de = torch.tensor([0.3]), torch.randn(2, 3, 1, 7)

    def embedded(*t):
        return gated_embedding(*t, example_dim=1, rate=rate, **DROPPED)

    compiled = torch.compile(embedded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), embedded(*tensors))
    for got, want in zip(
        torch.autograd.grad(compiled(*tensors), tensors[1:], de),
        torch.autograd.grad(embedded(*tensors), tensors[1:], de),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wanted", [(True,) * 4, (False,) * 4], ids=str)
def test_autocast_leaves_it_alone_as_torch_does(backend, wanted):
    """The same numbers, forward and backward: the core is given addresses, so a product in 16 bits would be misread."""
    tensors = operands(9, 130, 3, outer=4, batch=5, device=backend)
    de, differentiated = torch.randn(4, 5, 1, 130, device=backend), any(wanted)
    ours = leaves(tensors, wanted=wanted)
    want = apply(gated_embedding, ours), gradients(gated_embedding, ours, de) if differentiated else ()
    with torch.autocast(backend, dtype=torch.bfloat16):
        got = apply(gated_embedding, ours), gradients(gated_embedding, ours, de) if differentiated else ()
    for mine, wish in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, wish)


@use_backend("cpp")
def test_torch_s_default_dtype_and_device_don_t_change_what_the_core_reads():
    tensors = operands(9, 7, 3, outer=4)
    draw = dict(DROPPED, rate=torch.tensor([0.5]), example_dim=1)
    want = gated_embedding(*tensors, **draw)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(gated_embedding(*tensors, **draw), want)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(gated_embedding(*tensors, **draw), want)


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
    arguments = dict(zip(("tokens", *NAMES), operands(9, 7, 3), strict=True)) | dict(example_dim=1) | change
    arguments["hyper"] = arguments.pop("h")
    with pytest.raises(ValueError, match=message):
        gated_embedding(**arguments)
