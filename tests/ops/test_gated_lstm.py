import pytest
import torch
from flops import flops_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import assert_twice_as_good, relative_error

from stn_fast.dispatch import use_backend
from stn_fast.ops import products
from stn_fast.ops.gated_lstm import gated_lstm, reference
from stn_fast.ops.gates import GatedParameters, fold

SIDE = ("weight", "bias", "response_weight", "response_bias", "weight_gate", "bias_gate")
SIDES = ("input", "hidden")
NAMES = ("x", "h_0", "c_0", *(f"from_{side}.{name}" for side in SIDES for name in SIDE), "h")
BIASES = [i for i, name in enumerate(NAMES) if "bias" in name]
VALIDATION = tuple(name in ("x", "h") for name in NAMES)
# Drawn alike at every run: a sum of one number may cancel to less than its rounding, and pass or fail by chance.
property_test = settings(
    derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def operands(steps, batch, inputs, hidden, n, *, bias=True, dtype=torch.float32, seed=0):
    """As NAMES, drawn in float64 so that every dtype rounds the same."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def side(columns):
        matrix, scale = (4 * hidden, columns), columns**-0.5
        biases = [drawn(4 * hidden), drawn(4 * hidden), drawn(4 * hidden, n)] if bias else [None] * 3
        return [
            drawn(*matrix, scale=scale), biases[0], drawn(*matrix, scale=scale), biases[1],
            drawn(4 * hidden, n), biases[2],
        ]  # fmt: skip

    state = [drawn(batch, hidden), drawn(batch, hidden)]
    return [drawn(steps, batch, inputs), *state, *side(inputs), *side(hidden), drawn(batch, n)]


def apply(function, tensors, reverse=False):
    """`function` is gated_lstm or reference: y, h_n, c_n."""
    x, h_0, c_0, *weights, h = tensors
    y, state = function(x, h_0, c_0, GatedParameters(*weights[:6]), GatedParameters(*weights[6:]), h, reverse=reverse)
    return y, *state


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def leaves(tensors, dtype=None, wanted=(True,) * 16):
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(w)
        for t, w in zip(tensors, wanted, strict=True)
    ]


def gradients(function, tensors, incoming, reverse=False):
    """Of what requires one, given gradients of y, h_n, c_n; None is a result that nobody uses."""
    asked = [t for t in tensors if t is not None and t.requires_grad]
    used = [(r, d.to(r)) for r, d in zip(apply(function, tensors, reverse), incoming, strict=True) if d is not None]
    results, given_ones = zip(*used, strict=True)
    return torch.autograd.grad(results, asked, given_ones, materialize_grads=True)


def drawn_gradients(results, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype) for r in results]


def assert_as_good_as_plain_torch(tensors, wanted=(True,) * 16, reverse=False, used=(True, True, True)):
    """y, h_n, c_n and every wanted gradient, by the 2x rule."""
    exact, plain, ours = (leaves(tensors, d, wanted) for d in (torch.float64, None, None))
    results = apply(gated_lstm, ours, reverse), apply(reference, plain, reverse), apply(reference, exact, reverse)
    for name, *three in zip(("y", "h_n", "c_n"), *results, strict=True):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)
    if not any(t is not None and t.requires_grad for t in ours):
        return
    incoming = [d if u else None for d, u in zip(drawn_gradients(results[2], tensors[0].dtype), used, strict=True)]
    for name, *three in zip(
        [n for n, t in zip(NAMES, ours, strict=True) if t is not None and t.requires_grad],
        gradients(gated_lstm, ours, incoming, reverse),
        gradients(reference, plain, incoming, reverse),
        gradients(reference, exact, incoming, reverse),
        strict=True,
    ):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)


def plain_lstm(x, h_0, c_0, weights, biases):
    """torch's LSTM with these weights, for float64 inputs of one batch."""
    plain = torch.nn.LSTM(x.shape[2], h_0.shape[1], bias=biases[0] is not None, dtype=x.dtype)
    given_ones = dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), weights + biases, strict=True))
    result, (h_n, c_n) = torch.func.functional_call(
        plain, {name: value for name, value in given_ones.items() if value is not None}, (x, (h_0[None], c_0[None]))
    )
    return result, h_n[0], c_n[0]


@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_is_torchs_lstm_with_each_examples_own_weights(bias):
    """Weight for weight, W + diag(Gw h) R and b + (Gb h) ⊙ r, computed here."""
    tensors = operands(4, 3, 5, 6, 2, bias=bias, dtype=torch.float64)
    x, h_0, c_0, *weights, h = tensors
    got = apply(reference, tensors)
    for b in range(3):
        own, own_biases = [], []
        for w, bias_, r, r_bias, gate, bias_gate in (weights[:6], weights[6:]):
            own.append(w + torch.diag(gate @ h[b]) @ r)
            own_biases.append(bias_ + torch.diag(bias_gate @ h[b]) @ r_bias if bias else None)
        want = plain_lstm(x[:, b : b + 1], h_0[b : b + 1], c_0[b : b + 1], own, own_biases)
        assert relative_error(got[0][:, b : b + 1], want[0]) < 1e-14
        assert relative_error(got[1][b : b + 1], want[1]) < 1e-14
        assert relative_error(got[2][b : b + 1], want[2]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_with_zero_gates_it_is_torchs_lstm(dtype, bias, reverse):
    """Output, states and the gradients of all that torch's LSTM has, by the 2x rule and in float64 to its precision."""
    tensors = operands(6, 5, 7, 9, 3, bias=bias, dtype=dtype)
    tensors = [t if t is None or "gate" not in name else 0 * t for name, t in zip(NAMES, tensors, strict=True)]
    shared = [NAMES.index(name) for name in NAMES[:3]]
    shared += [NAMES.index(f"from_{side}.{name}") for name in ("weight", "bias")[: 1 + bias] for side in SIDES]

    def of_torch(of_dtype):
        own = leaves(tensors, of_dtype, tuple(i in shared for i in range(16)))
        x, h_0, c_0, *weights = own
        given = (x.flip(0) if reverse else x, h_0, c_0, [weights[0], weights[6]], [weights[1], weights[7]])
        y, *state = plain_lstm(*given)
        results = y.flip(0) if reverse else y, *state
        return results, torch.autograd.grad(results, [own[i] for i in shared], [d.to(of_dtype) for d in incoming])

    ours = leaves(tensors)
    results = apply(gated_lstm, ours, reverse)
    incoming = drawn_gradients(results, dtype)
    got = results, torch.autograd.grad(results, [ours[i] for i in shared], incoming)
    for mine, plain, exact in zip(got, of_torch(dtype), of_torch(torch.float64), strict=True):
        for three in zip(mine, plain, exact, strict=True):
            if dtype == torch.float64:
                assert relative_error(three[0], three[2]) < 1e-14
            assert_twice_as_good(*three)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_every_gradient_of_the_reference_matches_finite_differences(bias, reverse):
    tensors = leaves(operands(3, 2, 3, 2, 2, bias=bias, dtype=torch.float64))

    def of_given(*values):
        left = iter(values)
        return apply(reference, [None if t is None else next(left) for t in tensors], reverse)

    assert torch.autograd.gradcheck(of_given, [t for t in tensors if t is not None])


@property_test
@given(
    steps=st.integers(1, 6), batch=st.integers(1, 9), inputs=st.integers(1, 40),
    hidden=st.sampled_from([1, 2, 3, 7, 13, 16, 17, 31, 37]), n=st.integers(1, 9), bias=st.booleans(),
    reverse=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@use_backend("cpp")
def test_core_is_as_exact_as_plain_torch(steps, batch, inputs, hidden, n, bias, reverse, seed):
    assert_as_good_as_plain_torch(operands(steps, batch, inputs, hidden, n, bias=bias, seed=seed), reverse=reverse)


@pytest.mark.parametrize(
    "shape",
    [(3, 2, 5, 257, 3), (2, 67, 5, 251, 2), (1, 1, 1, 1, 1), (1, 5, 3, 4, 2), (9, 1, 3, 4, 2), (2, 3, 130, 8, 40)],
)
@use_backend("cpp")
def test_core_is_right_across_its_tasks_and_threads(shape):
    assert_as_good_as_plain_torch(operands(*shape))


@pytest.mark.parametrize("packed", [True, False])
@use_backend("cpp")
def test_core_is_right_with_weights_laid_out_beforehand_and_without(packed, monkeypatch):
    """Large weights; where torch lacks the internal products of oneDNN, its public ones do."""
    if packed and not products.offers_onednn():
        pytest.skip("this torch has no products with packed weights")
    monkeypatch.setattr(products, "offers_onednn", lambda: packed)
    hidden = 370
    assert 8 * hidden**2 > products._LARGE
    assert_as_good_as_plain_torch(operands(3, 5, 4, hidden, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_backend_and_dtype_obeys_the_2x_rule(backend, dtype, bias, reverse):
    tensors = operands(5, 17, 19, 23, 3, bias=bias, dtype=dtype)
    assert_as_good_as_plain_torch(on(backend, tensors), reverse=reverse)


def test_more_hyperparameters_than_a_kernel_holds(backend):
    assert_as_good_as_plain_torch(on(backend, operands(2, 3, 4, 5, 33)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@use_backend("reference")
def test_the_gradient_of_a_cell_that_forgets_nothing_sums_all_steps_in_float32(dtype):
    """Each step adds o · dy to it where c = 0 and f = 1; in 16 bits, what is added is soon less than a digit."""
    steps, tensors = 300, [0 * t for t in operands(300, 2, 3, 4, 1, dtype=dtype)]
    bias = tensors[NAMES.index("from_input.bias")]
    bias[4:8], bias[12:] = 20, -0.7
    c_0 = tensors[2].requires_grad_()
    (got,) = torch.autograd.grad(apply(gated_lstm, tensors)[0], c_0, torch.ones(steps, 2, 4, dtype=dtype))
    o = bias[12:].float().sigmoid().to(dtype)
    assert relative_error(got, steps * o.double().expand(2, 4)) < torch.finfo(dtype).eps


def test_float64_is_exact(device):
    tensors = on(device, operands(5, 3, 7, 6, 3, dtype=torch.float64))
    incoming = drawn_gradients(apply(reference, tensors), torch.float64)
    got = gradients(gated_lstm, leaves(tensors), incoming)
    for mine, want in zip(got, gradients(reference, leaves(tensors), incoming), strict=True):
        assert relative_error(mine, want) < 1e-13
    for mine, want in zip(apply(gated_lstm, tensors), apply(reference, tensors), strict=True):
        assert relative_error(mine, want) < 1e-14


SUBSETS = [tuple(i == k for i in range(16)) for k in range(16)]
SUBSETS += [tuple(i != k for i in range(16)) for k in range(16)]
SUBSETS += [tuple((mask >> i) & 1 == 1 for i in range(16)) for mask in range(1999, 65536, 1999)]


@pytest.mark.parametrize("chunk", range(4))
def test_subsets_of_wanted_gradients_are_right(backend, chunk):
    """Each alone, all but each, and others: what is computed never depends on what else is wanted."""
    tensors = on(backend, operands(2, 4, 5, 6, 2))
    for wanted in [*SUBSETS, VALIDATION, (False,) * 16][chunk::4]:
        assert_as_good_as_plain_torch(tensors, wanted)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_arrive_through_y_the_last_hidden_and_the_last_cell_state(backend, used, reverse):
    assert_as_good_as_plain_torch(on(backend, operands(3, 4, 5, 6, 2)), used=used, reverse=reverse)


def test_a_sequence_in_two_parts_is_the_sequence_at_once():
    """The state carries everything: values, and gradients across the cut."""
    tensors = leaves(operands(7, 3, 5, 6, 2))
    x, h_0, c_0, *rest = tensors
    y, h_n, c_n = apply(gated_lstm, tensors)
    first, *state = apply(gated_lstm, [x[:3], h_0, c_0, *rest])
    second, last_h, last_c = apply(gated_lstm, [x[3:], *state, *rest])
    results = torch.cat([first, second]), last_h, last_c
    for got, want in zip(results, (y, h_n, c_n), strict=True):
        assert relative_error(got, want) < 1e-6
    incoming = drawn_gradients(results, torch.float32)
    for got, want in zip(
        torch.autograd.grad(results, tensors, incoming),
        torch.autograd.grad((y, h_n, c_n), tensors, incoming),
        strict=True,
    ):
        assert relative_error(got, want) < 2e-6


def test_reverse_is_the_flipped_sequence():
    tensors = operands(5, 3, 4, 6, 2)
    y, h_n, c_n = apply(gated_lstm, tensors, reverse=True)
    flipped = apply(gated_lstm, [tensors[0].flip(0), *tensors[1:]])
    assert torch.equal(y, flipped[0].flip(0))
    assert torch.equal(h_n, flipped[1])
    assert torch.equal(c_n, flipped[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_validation_step_computes_no_weight_gradient(dtype, monkeypatch):
    """Frozen parameters: of the large products only those behind dx and the hidden states may run."""
    monkeypatch.setattr(products, "library", lambda: "torch.mm")  # the other's are not counted
    steps, batch, inputs, hidden, n = 8, 32, 48, 40, 3
    results = apply(gated_lstm, leaves(operands(steps, batch, inputs, hidden, n, dtype=dtype), wanted=VALIDATION))
    found = flops_of(results[0].sum().backward)
    rows, wide = steps * batch, 4 * hidden
    large = 2 * rows * wide * 2 * (inputs + hidden)
    assert large - 2 * batch * wide * 2 * hidden <= found <= large + 2 * batch * wide * 6 * n


@pytest.mark.parametrize("empty", [dict(batch=0), dict(inputs=0), dict(n=0)], ids=str)
def test_empty_sizes_give_empty_or_zero_results(backend, empty):
    sizes = dict(steps=2, batch=3, inputs=4, hidden=5, n=2) | empty
    steps, batch, inputs, hidden, n = sizes.values()
    tensors = on(backend, operands(steps, batch, max(inputs, 1), hidden, n))
    if inputs == 0:
        tensors = [t if i not in (0, 3, 5) else t[..., :0] for i, t in enumerate(tensors)]
    tensors = leaves(tensors)
    results = apply(gated_lstm, tensors)
    assert results[0].shape == (steps, batch, hidden)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(r.sum() for r in results), tensors))
    for got, want in zip(results, apply(reference, tensors), strict=True):
        assert relative_error(got, want) < 1e-6


def test_non_contiguous_inputs_and_gradients():
    tensors = operands(3, 6, 5, 7, 3)
    twisted = [t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t for t in tensors]
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors]
    y = apply(gated_lstm, tensors)[0]
    incoming = [torch.ones(()).expand_as(y), None, torch.ones(()).expand_as(tensors[1])]
    want = gradients(gated_lstm, leaves(tensors), incoming)
    for other in (twisted, strided):
        other = leaves(other)
        assert relative_error(apply(gated_lstm, other)[0], y) < 1e-6
        for got, wish in zip(gradients(gated_lstm, other, incoming), want, strict=True):
            assert relative_error(got, wish) < 1e-6


def test_backward_leaves_what_it_reads_as_it_was(backend):
    """The same graph twice, as retain_graph promises, and the gradients that came in."""
    tensors = leaves(on(backend, operands(3, 4, 5, 6, 2)))
    results = apply(gated_lstm, tensors)
    incoming = on(backend, drawn_gradients(results, torch.float32))
    before = [d.clone() for d in incoming]
    first = torch.autograd.grad(results, tensors, incoming, retain_graph=True)
    second = torch.autograd.grad(results, tensors, incoming)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, incoming, before))


def test_folding_gives_the_plain_lstm_at_one_shared_h():
    *tensors, h = operands(4, 3, 5, 6, 2, dtype=torch.float64)
    for reverse in (False, True):
        shared = apply(gated_lstm, [*tensors, h[0]], reverse)
        for got, want in zip(shared, apply(gated_lstm, [*tensors, h[:1].expand(3, -1)], reverse), strict=True):
            assert relative_error(got, want) < 1e-14
    (weight_ih, bias_ih), (weight_hh, bias_hh) = (
        fold(GatedParameters(*side), h[0]) for side in (tensors[3:9], tensors[9:15])
    )
    want = plain_lstm(*tensors[:3], [weight_ih, weight_hh], [bias_ih, bias_hh])
    for got, wish in zip(apply(gated_lstm, [*tensors, h[0]]), want, strict=True):
        assert relative_error(got, wish) < 1e-14


@pytest.mark.parametrize("wanted", ["h", "from_hidden.weight", "x", "h_0"])
def test_folded_in_float32_as_exact_as_the_rows_are(wanted):
    """torch has another implementation for float32 on the CPU, and one for every gradient that may be wanted."""
    *tensors, h = operands(4, 3, 5, 6, 2)
    asked = tuple(name == wanted for name in NAMES)
    results = []
    for dtype, function, own in ((None, gated_lstm, h[0]), (None, reference, h[0]), (torch.float64, reference, h[0])):
        ours = leaves([*tensors, own], dtype, asked)
        given = ours if function is gated_lstm else [*ours[:-1], ours[-1].expand(3, -1)]
        incoming = drawn_gradients(apply(reference, [*tensors, h]), torch.float32)
        of_function = apply(function, given)
        (gradient,) = torch.autograd.grad(
            of_function, [t for t in ours if t is not None and t.requires_grad], [d.to(ours[0].dtype) for d in incoming]
        )
        results.append([*of_function, gradient])
    for name, *three in zip(("y", "h_n", "c_n", wanted), *results, strict=True):
        assert_twice_as_good(*three, name=name)


@pytest.mark.parametrize("wanted", [True, False])
def test_folded_runs_in_the_mode_whose_backward_cudnn_has(wanted, monkeypatch):
    """cuDNN refuses the backward pass of what ran in inference mode; results don't depend on it without dropout."""
    modes, lstm = [], torch._VF.lstm

    def spy(*args, train, **options):
        modes.append(train)
        return lstm(*args, train=train, **options)

    monkeypatch.setattr(torch._VF, "lstm", spy)
    *tensors, h = leaves(operands(4, 3, 5, 6, 2), wanted=tuple(wanted and name == "h" for name in NAMES))
    apply(gated_lstm, [*tensors, h[0]])
    with torch.no_grad():
        apply(gated_lstm, [*tensors, h[0]])
    assert modes == [wanted, False]


@pytest.mark.parametrize("bias", [True, False])
def test_folded_layer_carries_gradients_to_h_and_the_state(bias):
    *tensors, h = operands(4, 3, 5, 6, 2, bias=bias, dtype=torch.float64)
    got = leaves([*tensors, h[0]])
    want = leaves([*tensors, h[:1]])
    incoming = drawn_gradients(apply(reference, [*tensors, h]), torch.float64)
    folded = gradients(gated_lstm, got, incoming)
    rows = apply(gated_lstm, [*want[:-1], want[-1].expand(3, -1)])
    asked = [t for t in want if t is not None]
    for mine, wish in zip(folded, torch.autograd.grad(rows, asked, incoming), strict=True):
        assert relative_error(mine, wish.view_as(mine)) < 1e-12


@pytest.mark.parametrize("shared", [False, True])
def test_forward_mode_tangent_is_not_silently_zero(shared):
    primals = operands(3, 2, 4, 5, 2, dtype=torch.float64)
    tangents = operands(3, 2, 4, 5, 2, dtype=torch.float64, seed=1)
    if shared:
        primals[-1], tangents[-1] = primals[-1][0], tangents[-1][0]
    _, got = torch.func.jvp(lambda *t: apply(gated_lstm, t), tuple(primals), tuple(tangents))
    step = 1e-6
    ahead = apply(gated_lstm, [p + step * t for p, t in zip(primals, tangents, strict=True)])
    behind = apply(gated_lstm, [p - step * t for p, t in zip(primals, tangents, strict=True)])
    for tangent, a, b in zip(got, ahead, behind, strict=True):
        assert relative_error(tangent, (a - b) / (2 * step)) < 1e-7


@pytest.mark.parametrize("shared", [False, True])
def test_works_under_grad_and_vmap_of_torch_func(shared):
    x, *tensors, h = operands(3, 2, 4, 5, 2, dtype=torch.float64)
    h = h[0] if shared else h
    grad = torch.func.grad(lambda h_: apply(gated_lstm, [x, *tensors, h_])[0].square().sum())(h)
    leaf = h.clone().requires_grad_()
    want = torch.autograd.grad(apply(reference, [x, *tensors, leaf.expand(2, 2)])[0].square().sum(), leaf)[0]
    assert relative_error(grad, want) < 1e-12
    many = torch.vmap(lambda x_: apply(gated_lstm, [x_, *tensors, h])[0])(torch.stack([x, 2 * x]))
    assert relative_error(many[1], apply(gated_lstm, [2 * x, *tensors, h])[0]) < 1e-12


def test_second_derivatives_in_reverse_mode_raise_instead_of_lying():
    tensors = leaves(operands(2, 3, 4, 5, 2))
    first = torch.autograd.grad(apply(gated_lstm, tensors)[0].square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first[0].sum(), tensors[3], allow_unused=True)


@pytest.mark.parametrize("bias", [True, False])
def test_registration_is_complete(backend, bias):
    tensors = on(backend, operands(3, 2, 4, 5, 2, bias=bias))
    args = leaves(tensors)
    torch.library.opcheck(torch.ops.stn_fast.gated_lstm.default, (*args, False, True, True))
    y, _, *saved = torch.ops.stn_fast.gated_lstm(*tensors, False, True, True)
    kept = [None if i in (4, 10) else t for i, t in enumerate(tensors)]
    wanted = [t is not None for t in tensors]
    torch.library.opcheck(
        torch.ops.stn_fast.gated_lstm_backward.default,
        (torch.randn_like(y), torch.randn_like(tensors[2]), *kept, y, *saved, False, wanted),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_graph_break_to_the_same_numbers():
    tensors = leaves(operands(3, 4, 5, 7, 3))
    compiled = torch.compile(lambda *t: apply(gated_lstm, t), fullgraph=True, backend="aot_eager")
    results = apply(gated_lstm, tensors)
    incoming = drawn_gradients(results, torch.float32)
    assert all(map(torch.equal, compiled(*tensors), results))
    got = torch.autograd.grad(compiled(*tensors), tensors, incoming)
    assert all(map(torch.equal, got, torch.autograd.grad(results, tensors, incoming)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype):
    tensors = leaves(operands(3, 4, 5, 7, 3))
    with torch.autocast("cpu", dtype=dtype):
        results = apply(gated_lstm, tensors)
    plain = apply(reference, leaves(tensors, dtype))
    for got, other, exact in zip(results, plain, apply(reference, leaves(tensors, torch.float64)), strict=True):
        assert got.dtype == dtype
        assert_twice_as_good(got, other, exact)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(results[0].float().sum(), tensors))


def test_autocast_around_a_backward_pass_alone_changes_nothing(backend):
    """The core is given addresses: a product in 16 bits would be misread."""
    tensors = leaves(on(backend, operands(3, 4, 5, 7, 3)))
    results = apply(gated_lstm, tensors)
    incoming = on(backend, drawn_gradients(results, torch.float32))
    want = torch.autograd.grad(results, tensors, incoming, retain_graph=True)
    with torch.autocast(backend, dtype=torch.bfloat16):
        got = torch.autograd.grad(results, tensors, incoming)
    assert all(map(torch.equal, got, want))


@use_backend("cpp")
def test_torch_s_default_dtype_and_device_don_t_change_what_the_core_computes():
    tensors = operands(3, 4, 5, 7, 3)
    incoming = drawn_gradients(apply(reference, tensors), torch.float32)

    def everything():
        return [*apply(gated_lstm, tensors), *gradients(gated_lstm, leaves(tensors), incoming)]

    want = everything()
    torch.set_default_dtype(torch.float64)
    try:
        results = [everything()]
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        results.append(everything())
    for result in results:
        assert all(map(torch.equal, result, want))


def test_autocast_leaves_float64_alone_as_torch_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apply(gated_lstm, operands(2, 3, 4, 5, 2, dtype=torch.float64))[0].dtype == torch.float64


def test_memory_kept_for_backward_is_what_is_stated():
    """Gates, cells and y, and both responses where a gate's gradient is wanted; nothing without a gradient."""
    steps, batch, hidden = 6, 8, 16
    tensors = operands(steps, batch, 12, hidden, 3)
    operands_ = sum(t.numel() for i, t in enumerate(tensors) if i not in (4, 10))  # not the biases themselves

    def saved(wanted):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            apply(gated_lstm, leaves(tensors, wanted=wanted))
        return sum(numbers)

    cell = steps * batch * hidden
    assert saved((True,) * 16) == operands_ + (4 + 1 + 1 + 8) * cell
    assert saved(tuple(name == "x" for name in NAMES)) == operands_ + (4 + 1 + 1) * cell
    assert saved((False,) * 16) == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.randn(3, 4, 6), r"from_input.weight must be \(28, 6\).*got \(28, 5\)"),
        ("x", torch.randn(4, 5), r"wants x \(T, B, I\).*got x \(4, 5\)"),
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
    tensors = operands(3, 4, 5, 7, 3)
    tensors[NAMES.index(name)] = value
    with pytest.raises(ValueError, match=message):
        apply(gated_lstm, tensors)


def test_biases_on_one_side_alone_are_refused():
    tensors = operands(3, 4, 5, 7, 3)
    with pytest.raises(ValueError, match="of both from_input and from_hidden, or none"):
        apply(gated_lstm, [None if i in BIASES[:3] else t for i, t in enumerate(tensors)])


def test_whole_numbers_are_refused():
    tensors = [t.to(torch.int64) for t in operands(3, 4, 5, 7, 3)]
    with pytest.raises(ValueError, match=r"floating point numbers; got torch.int64"):
        apply(gated_lstm, tensors)
