import copy
import gc
import re

import pytest
import torch
from numerics import assert_twice_as_good, relative_error
from torch.nn.utils.rnn import pack_sequence
from torch.profiler import ProfilerActivity, profile

import stn_fast as stn
from stn_fast import functional
from stn_fast.ops.gated_lstm import reference
from stn_fast.ops.gates import GatedParameters
from stn_fast.training.methods import check_streams

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("locked", low=0.0, high=0.9, init=0.4),
        stn.Hyperparameter("connect", low=0.0, high=0.9, init=0.3, per_example=False),
        stn.Hyperparameter("unbounded", init=0.0, per_example=False),
    ]
)
BOTH = dict(dropout="locked", recurrent_dropout="connect", stream=5)


def sampled(batch, step=0, first_example=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=3, step=step, first_example=first_example)


def layer_of(*sizes, gates=1.0, **options):
    """A layer of input size, hidden size and number of layers, its gates as large as `gates` says."""
    torch.manual_seed(0)
    layer = stn.HyperLSTM(*sizes, num_hyperparameters=len(SPACE), **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "gate" in name:
                parameter.normal_().mul_(gates)
    return layer


def drawn(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(layer, batch, dtype=torch.float32):
    shape = layer.num_layers * (2 if layer.bidirectional else 1), batch, layer.hidden_size
    return drawn(*shape, dtype=dtype, seed=2), drawn(*shape, dtype=dtype, seed=3)


def weights_of(layer, side, suffix):
    return GatedParameters._make(getattr(layer, f"{name}_{side}_{suffix}") for name in GatedParameters._fields)


def results_and_gradients(layer, names, x, state, *hyper, dtype):
    """y, h_n, c_n, and the gradients of x, h_0, c_0 and the parameters named, in this dtype."""
    module = copy.deepcopy(layer).to(dtype)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *state)]
    y, after = module(leaves[0], *hyper, tuple(leaves[1:]))
    incoming = [drawn(*r.shape, dtype=dtype, seed=9 + i) for i, r in enumerate((y, *after))]
    leaves += [module.get_parameter(name) for name in names]
    return [y, *after, *torch.autograd.grad((y, *after), leaves, incoming)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=False),
        dict(num_layers=3),
        dict(num_layers=2, bidirectional=True, bias=False),
        dict(num_layers=2, bidirectional=True, batch_first=True),
        dict(batch_first=True),
    ],
    ids=str,
)
def test_with_zero_gates_it_is_torchs_lstm_loaded_from_its_checkpoint(options, dtype):
    """Output, both states and every gradient, whatever the hyperparameters are."""
    torch.manual_seed(0)
    plain, layer = torch.nn.LSTM(5, 7, **options), layer_of(5, 7, gates=0.0, **options)
    loaded = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all("response" in name or "gate" in name for name in loaded.missing_keys)
    names = [name for name, _ in plain.named_parameters()]
    given = names, drawn(4, 4, 5), state_of(layer, 4)
    ours = results_and_gradients(layer, *given, sampled(4), dtype=dtype)
    exact = results_and_gradients(plain, *given, dtype=torch.float64)
    theirs = results_and_gradients(plain, *given, dtype=dtype)
    what = ["y", "h_n", "c_n", "x", "h_0", "c_0", *names]
    for name, *three in zip(what, ours, theirs, exact, strict=True):
        assert_twice_as_good(*three, name=name)
        if dtype == torch.float64:
            assert relative_error(three[0], three[2]) < 1e-13


@pytest.mark.parametrize("bias", [True, False])
def test_computes_the_formula_layer_by_layer_with_its_own_parameters(bias):
    layer, hyper = layer_of(5, 7, 2, bias=bias, bidirectional=True, dtype=torch.float64), sampled(3)
    y, (h_0, c_0) = drawn(4, 3, 5, dtype=torch.float64), state_of(layer, 3, torch.float64)
    got, (h_n, c_n) = layer(y, hyper, (h_0, c_0))
    place = 0
    for k in range(2):
        directions = []
        for suffix in (f"l{k}", f"l{k}_reverse"):
            sides = weights_of(layer, "ih", suffix), weights_of(layer, "hh", suffix)
            output, (hidden, cell) = reference(
                y, h_0[place], c_0[place], *sides, hyper.response.double(), reverse=suffix.endswith("reverse")
            )
            directions.append(output)
            assert relative_error(h_n[place], hidden) < 1e-14
            assert relative_error(c_n[place], cell) < 1e-14
            place += 1
        y = torch.cat(directions, dim=-1)
    assert relative_error(got, y) < 1e-14


def test_no_state_is_a_state_of_zeros():
    layer, x, hyper = layer_of(5, 7, 2), drawn(4, 3, 5), sampled(3)
    zeros = torch.zeros(2, 3, 7)
    assert torch.equal(layer(x, hyper)[0], layer(x, hyper, (zeros, zeros))[0])


def test_the_state_carries_a_sequence_on():
    layer, x, hyper = layer_of(5, 7, 2), drawn(8, 3, 5), sampled(3)
    y, after = layer(x, hyper)
    first, state = layer(x[:5], hyper)
    second, last = layer(x[5:], hyper, state)
    for got, want in zip((torch.cat([first, second]), *last), (y, *after), strict=True):
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_example_without_a_batch_is_a_batch_of_one(batch_first):
    layer, x, hyper = layer_of(5, 7, 2, batch_first=batch_first), drawn(4, 5), sampled(1)
    state = state_of(layer, 1)
    y, after = layer(x, hyper, tuple(s[:, 0] for s in state))
    want, of_batch = layer(x.unsqueeze(0 if batch_first else 1), hyper, state)
    assert torch.equal(y, want.squeeze(0 if batch_first else 1))
    assert all(torch.equal(got, wish[:, 0]) for got, wish in zip(after, of_batch, strict=True))


@pytest.mark.parametrize("options", [dict(), dict(bias=False, bidirectional=True, batch_first=True)], ids=str)
def test_fold_gives_the_same_plain_lstm(options):
    layer = layer_of(5, 7, 2, dtype=torch.float64, **options)
    response, x = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), drawn(4, 4, 5, dtype=torch.float64)
    plain = layer.fold(response)
    assert type(plain) is torch.nn.LSTM
    (y, after), (want, wanted) = layer(x, response.expand(4, 3)), plain(x)
    for got, wish in zip((y, *after), (want, *wanted), strict=True):
        assert relative_error(got, wish) < 1e-14
    assert not layer.eval().fold(response).training


def test_shared_hyperparameters_run_folded_in_torchs_own_lstm(monkeypatch):
    layer, x = layer_of(50, 40, 2, **BOTH).eval(), drawn(6, 20, 50)
    shared = SPACE.at(SPACE.initial_state()[0] + 0.5, batch_size=20)
    rows = layer(x, shared.response.clone())[0]
    assert relative_error(layer(x, shared)[0], rows) < 1e-6
    calls, theirs = [], torch._VF.lstm
    monkeypatch.setattr(torch._VF, "lstm", lambda *given, **named: calls.append(given) or theirs(*given, **named))
    layer(x, shared)
    assert len(calls) == 2  # a layer each
    layer(x, shared.response.clone())
    assert len(calls) == 2


def test_weight_decay_is_that_of_each_examples_effective_matrices():
    layer, hyper, decay = layer_of(5, 7, 2, bidirectional=True), sampled(3), torch.rand(3)
    want = 0.0
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for side in ("ih", "hh"):
            of_side = weights_of(layer, side, suffix)
            for b in range(3):
                gate = (of_side.weight_gate @ hyper.response[b])[:, None]
                want += 0.5 * decay[b] / 3 * (of_side.weight + gate * of_side.response_weight).square().sum()
    assert relative_error(layer.weight_decay_penalty(hyper, decay), want) < 1e-6


def masked(layer, suffix, hyper, stream):
    """The hidden-to-hidden weights under a mask drawn here."""
    of_side = weights_of(layer, "hh", suffix)
    ones = torch.ones_like(of_side.weight)[None]
    mask = functional.dropout(ones, hyper["connect"][:1], seed=3, step=int(hyper.step), stream=stream)[0]
    assert 0 < (mask == 0).sum() < mask.numel()
    return of_side._replace(weight=of_side.weight * mask, response_weight=of_side.response_weight * mask)


def test_drop_connect_and_locked_dropout_are_where_they_belong():
    """One mask a batch on W and R alike, one an example between layers; output and all gradients as written out."""
    layer, hyper, x = layer_of(5, 7, 3, **BOTH), sampled(4, step=2, first_example=100), drawn(6, 4, 5)
    h_0, c_0 = state_of(layer, 4)
    y, _ = layer(x, hyper, (h_0, c_0))
    want = x
    for k in range(3):
        sides = weights_of(layer, "ih", f"l{k}"), masked(layer, f"l{k}", hyper, stream=5 + 2 + k)
        want, _ = reference(want, h_0[k], c_0[k], *sides, hyper.response)
        if k < 2:
            ones = torch.ones(4, 7)
            kept = functional.dropout(ones, hyper["locked"], seed=3, step=2, stream=5 + k, first_example=100)
            assert 0 < (kept == 0).sum() < kept.numel()
            want = want * kept
    assert relative_error(y, want) < 1e-6
    dy, leaves = drawn(*y.shape, seed=4), list(layer.parameters())
    expected = torch.autograd.grad(want, leaves, dy)
    for got, wish in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
        assert relative_error(got, wish) < 1e-5


def test_eval_mode_drops_nothing():
    layer, x, hyper = layer_of(5, 7, 2, **BOTH), drawn(6, 4, 5), sampled(4)
    plain = layer_of(5, 7, 2)
    assert torch.equal(layer.eval()(x, hyper)[0], plain(x, hyper)[0])
    assert not torch.equal(layer.train()(x, hyper)[0], plain(x, hyper)[0])


def test_masks_change_with_the_step_and_not_with_the_part_of_the_batch():
    """DropConnect is the same in every process that has a part of the batch; locked dropout is each example's own."""
    layer, x = layer_of(5, 7, 2, **BOTH), drawn(6, 4, 5)
    whole, half = sampled(4, step=1), sampled(2, step=1, first_example=2)
    y = layer(x, whole)[0]
    assert torch.allclose(layer(x[:, 2:], half)[0], y[:, 2:], atol=1e-6)
    assert not torch.allclose(layer(x, sampled(4, step=2))[0], y, atol=1e-2)


def test_every_layer_and_direction_draws_from_a_stream_of_its_own():
    layer = layer_of(5, 7, 3, bidirectional=True, **BOTH)
    streams = [module.stream for module in layer.modules() if hasattr(module, "stream")]
    assert sorted(streams) == list(range(5, 5 + 2 + 6))
    check_streams(layer)
    alone = layer_of(5, 7, 3, bidirectional=True, recurrent_dropout="connect", stream=5)
    assert [module.stream for module in alone.modules() if hasattr(module, "stream")] == list(range(7, 13))
    pair = torch.nn.ModuleList([layer, stn.PerExampleDropout("locked", stream=12)])
    with pytest.raises(ValueError, match=r"'0\.drop_connects\.l2_reverse' and '1' both draw from stream 12"):
        check_streams(pair)


def test_memory_is_flat_over_steps():
    layer, x = layer_of(5, 7, 2, **BOTH), drawn(6, 4, 5)

    def steps(first, last):
        state = None
        for number in range(first, last):
            y, after = layer(x, sampled(4, number), state)
            torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            state = tuple(s.detach() for s in after)

    steps(0, 2)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps(2, 5)
    events = profiler.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert kept == 0


def test_compiles_without_graph_break_to_the_same_numbers():
    layer, x = layer_of(5, 7, 2, **BOTH), drawn(6, 4, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, sampled(4))[1], layer(x, sampled(4))[1], strict=True):
        assert torch.equal(got, want)


def test_empty_batch_gives_an_empty_result():
    layer = layer_of(5, 7, 2, **BOTH)
    y, (h_n, c_n) = layer(drawn(6, 0, 5), sampled(0))
    assert y.shape == (6, 0, 7)
    assert h_n.shape == c_n.shape == (2, 0, 7)


def test_dropout_of_a_single_layer_warns_as_torch_does():
    with pytest.warns(UserWarning, match="dropout='locked' is applied after every layer but the last"):
        layer_of(5, 7, dropout="locked", stream=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(input_size=0), "input_size must be an int >= 1.*got 0"),
        (dict(hidden_size=-1), "hidden_size must be an int >= 1.*got -1"),
        (dict(num_layers=0), "num_layers must be an int >= 1.*got 0"),
        (dict(num_hyperparameters=0), "num_hyperparameters must be an int >= 1.*got 0"),
        (dict(proj_size=3), "proj_size must be 0, projections are not supported, got 3"),
        (dict(dropout=0.5), r": dropout must be the name of the hyperparameter that is its rate, got 0\.5"),
        (dict(recurrent_dropout=0.5), r"recurrent_dropout must be the name .*, got 0\.5"),
        (dict(num_layers=2, dropout=""), ": dropout must be the name .*, got ''"),
        (dict(recurrent_dropout="", stream=1), "recurrent_dropout must be the name .*, got ''"),
        (dict(num_layers=2, dropout="locked"), "dropout='locked' needs stream"),
        (dict(recurrent_dropout="connect"), "recurrent_dropout='connect' needs stream"),
        (dict(recurrent_dropout="connect", stream=0), "stream must be an int >= 1.*got 0"),
    ],
    ids=str,
)
def test_unfit_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        stn.HyperLSTM(**(dict(input_size=2, hidden_size=2, num_hyperparameters=2) | change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("locked", r"'locked' must have per_example=False, because DropConnect"),
        ("unbounded", r"'unbounded' is a dropout rate, so its bounds must be 0 <= low and high < 1, got low=None"),
    ],
)
def test_a_per_example_rate_of_drop_connect_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        layer_of(5, 7, recurrent_dropout=name, stream=1)(drawn(2, 4, 5), sampled(4))


def test_wrong_arguments_are_named_in_the_error():
    layer, x = layer_of(5, 7, 2), drawn(6, 4, 5)
    fitting = torch.zeros(2, 4, 7)
    for name, state in {"h_0": (torch.zeros(1, 4, 7), fitting), "c_0": (fitting, torch.zeros(2, 3, 7))}.items():
        with pytest.raises(ValueError, match=rf"{name} must be \(2, 4, 7\), \(num_layers · directions, B, H\)"):
            layer(x, sampled(4), state)
    with pytest.raises(
        ValueError, match=r"h_0 must be \(2, 7\), \(num_layers · directions, H\), to fit x without a batch"
    ):
        layer(x[:, 0], sampled(1), (torch.zeros(2, 1, 7), torch.zeros(2, 1, 7)))
    for state, got in (
        (fitting, "Tensor"),
        ((fitting,), "1 of them"),
        ([fitting] * 3, "3 of them"),
        ((None, None), "h_0 as NoneType"),
        ((fitting, fitting.tolist()), "c_0 as list"),
    ):
        with pytest.raises(ValueError, match=rf"state must be two tensors, \(h_0, c_0\), got {got}"):
            layer(x, sampled(4), state)
    with pytest.raises(ValueError, match=r"HyperBatch has 3 examples, but x \(6, 4, 5\) has 4 in dimension 1"):
        layer(x, sampled(3))
    with pytest.raises(ValueError, match=r"HyperBatch has 4 examples, but x \(6, 4, 5\) has 6 in dimension 0"):
        layer_of(5, 7, batch_first=True)(x, sampled(4))
    with pytest.raises(ValueError, match="num_hyperparameters=3, but hyper has 2"):
        layer(x, torch.zeros(4, 2))
    for shape in ((6, 4, 6), (6, 4, 1, 5), (5,)):
        with pytest.raises(
            ValueError, match=rf"x must be \(T, B, I\) or \(T, I\) with I = input_size=5, got {re.escape(str(shape))}"
        ):
            layer(drawn(*shape), sampled(4))
    with pytest.raises(ValueError, match="at least one time step"):
        layer(drawn(0, 4, 5), sampled(4))
    with pytest.raises(ValueError, match=r"response must have shape \(3,\), got \(2,\)"):
        layer.fold(torch.zeros(2))
    with pytest.raises(TypeError, match="does not support PackedSequence; pad the sequences"):
        layer(pack_sequence([drawn(6, 5), drawn(4, 5)]), sampled(2))
    with pytest.raises(TypeError, match="hyper must be a HyperBatch in training mode, got its response"):
        layer_of(5, 7, recurrent_dropout="connect", stream=1)(x, sampled(4).response)
