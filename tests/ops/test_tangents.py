"""gated_sum, the tangent of an LSTM, and layers at h = 0. Whole networks: tests/training/test_delta.py."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from contract import Problem
from contract_checks import (
    assert_as_good_as_plain_torch,
    assert_gradients_do_not_depend_on_what_else_is_wanted,
    assert_registration_is_complete,
    assert_within_twice,
)
from numerics import relative_error
from random_response import respond
from torch.autograd import forward_ad

from stn_fast import functional
from stn_fast.dispatch import choose
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace
from stn_fast.layers import HyperBatchNorm2d, HyperConv2d, HyperEmbedding, HyperLinear, HyperLSTM
from stn_fast.ops import gated_sum, tangents
from stn_fast.ops.gated_lstm import tangent as lstm
from stn_fast.training.parameters import is_response

GATES = ("weight_gate", "response_bias", "bias_gate")


def sums(dtype=torch.float32, device="cpu", batch=5, outputs=19, n=3, outer=1, inner=1, bias=True, p=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    rows = outer * batch * inner
    operands = {"q": draw(rows, outputs), "weight_gate": draw(outputs, n)}
    if bias:
        operands |= {"response_bias": draw(outputs), "bias_gate": draw(outputs, n)}
    operands["h"] = draw(batch, n)
    if p:
        operands["p"] = draw(rows, outputs)
    sizes = dict(outer=outer, inner=inner)

    def of(function):
        def run(*given):
            named = dict.fromkeys(("q", *GATES, "h", "p")) | dict(zip(operands, given, strict=True))
            return (function(*named.values(), **sizes),)

        return run

    return Problem(operands, {"y": 0}, of(gated_sum.gated_sum), of(gated_sum.reference), None)


SIZES = {
    "rows": {},
    "time first": dict(outer=3, inner=2, outputs=37),
    "no bias": dict(bias=False, inner=4),
    "no P": dict(p=False, outer=2),
    "of one": dict(batch=1, outputs=1, n=1),
    "many": dict(batch=40, outputs=130, n=17, outer=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sums_and_their_gradients_obey_the_2x_rule(sizes, dtype, backend):
    if dtype != torch.float32 and choose(torch.device("cpu")) == "cpp":
        pytest.skip("the core computes float32")
    assert_as_good_as_plain_torch(sums(dtype, backend, **sizes))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_example_is_shifted_and_scaled_by_its_own_gates(sizes):
    problem = sums(torch.float64, **sizes)
    named = problem.operands
    (y,) = problem.call(*named.values())
    outer, inner, h = sizes.get("outer", 1), sizes.get("inner", 1), named["h"]
    for m in range(len(y)):
        b = m // inner % len(h)
        expected = (named["weight_gate"] @ h[b]) * named["q"][m]
        expected += named["p"][m] if "p" in named else 0
        expected += (named["bias_gate"] @ h[b]) * named["response_bias"] if "bias_gate" in named else 0
        torch.testing.assert_close(y[m], expected, rtol=1e-14, atol=1e-14)
    assert len(y) == outer * len(h) * inner


def test_gradients_of_sums_match_finite_differences():
    problem = sums(torch.float64, batch=2, outputs=3, n=2, outer=2)
    inputs = tuple(tensor.requires_grad_() for tensor in problem.operands.values())
    assert torch.autograd.gradcheck(problem.call, inputs)


def test_gradients_of_sums_do_not_depend_on_what_else_is_wanted(backend):
    problem = sums(device=backend, outer=2, p=False)
    assert_gradients_do_not_depend_on_what_else_is_wanted(SimpleNamespace(module=gated_sum), problem)


@pytest.mark.parametrize("sizes", [dict(outer=2), dict(p=False)], ids=["P", "no P"])
def test_the_registration_of_sums_is_complete(sizes):
    assert_registration_is_complete(SimpleNamespace(name="gated_sum"), sums(**sizes))


def cells(dtype=torch.float32, steps=4, batch=5, hidden=7, states=True, reverse=False):
    """The tangents of an LSTM's states, from those of its first state and of its gates before activation."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight, h_0, c_0 = draw(4 * hidden, hidden), draw(batch, hidden), draw(batch, hidden)
    before = draw(steps, batch, 4 * hidden)
    operands = {"d_before": draw(steps, batch, 4 * hidden)}
    if states:
        operands |= {"d_h_0": draw(batch, hidden), "d_c_0": draw(batch, hidden)}

    def call(d_before, d_h_0=None, d_c_0=None):
        given = [t.to(d_before.dtype) for t in (before, h_0, c_0, weight)]
        _, _, gates, states = lstm._states(*given, reverse)
        return lstm._operation(d_before, given[3], gates, states, given[2], d_h_0, d_c_0, reverse)

    def definition(d_before, d_h_0=None, d_c_0=None):
        given = [t.to(d_before.dtype) for t in (before, h_0, c_0, weight)]
        zeros = torch.zeros_like(given[1])

        def states(before, hidden, cell):
            found = []
            for b in before.unbind(0)[:: -1 if reverse else 1]:
                i, f, g, o = (b + hidden @ given[3].T).chunk(4, -1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                found.append(hidden)
            return torch.stack(found[:: -1 if reverse else 1]), cell

        along = (d_before, zeros if d_h_0 is None else d_h_0, zeros if d_c_0 is None else d_c_0)
        return torch.func.jvp(states, tuple(given[:3]), along)[1]

    return Problem(operands, {"dy": 1, "dc_n": 0}, call, definition, None)


def computed(problem, function, dtype):
    """As `compute`, for operands without an h."""
    typed = problem._replace(operands={name: t.to(dtype) for name, t in problem.operands.items()})
    inputs = {name: t.clone().requires_grad_() for name, t in typed.operands.items()}
    results = function(*inputs.values())
    weights = [torch.linspace(-1, 1, r.numel(), dtype=torch.float64).view(r.shape).to(r.dtype) for r in results]
    found = torch.autograd.grad(results, list(inputs.values()), weights)
    return dict(zip(("dy", "dc_n"), results, strict=True)) | {
        f"d_{name}": g for name, g in zip(inputs, found, strict=True)
    }


LSTMS = {
    "states": {},
    "no state": dict(states=False),
    "reversed": dict(reverse=True),
    "one step": dict(steps=1, hidden=1),
    "many": dict(steps=9, batch=17, hidden=67),
}


@pytest.mark.parametrize("sizes", LSTMS.values(), ids=LSTMS)
def test_the_tangent_of_an_lstm_is_that_of_torch_func(sizes):
    """And its gradients: in float64, and in float32 by the 2x rule."""
    problem = cells(torch.float64, **sizes)
    exact = computed(problem, problem.definition, torch.float64)
    for name, numbers in computed(problem, problem.call, torch.float64).items():
        assert relative_error(numbers, exact[name]) < 1e-13, name
    ours, plain = (computed(problem, way, torch.float32) for way in (problem.call, problem.definition))
    assert_within_twice(ours, plain, exact)


@pytest.mark.parametrize("states", [True, False], ids=["states", "no state"])
def test_the_registration_of_the_lstms_tangent_is_complete(states):
    problem = cells(states=states)
    given = [t.requires_grad_() for t in problem.operands.values()]
    inputs = (torch.randn(4, 5, 28), torch.randn(5, 7), torch.randn(5, 7), torch.randn(28, 7), False)
    torch.library.opcheck(lstm._states.registered, inputs)
    *_, gates, of_cells = lstm._states(*inputs)
    constants = (torch.randn(28, 7), gates, of_cells, torch.randn(5, 7))
    operands = (given[0], *constants, *(given[1:] or (None, None)), False)
    torch.library.opcheck(lstm._operation.registered, operands)


# Layers at h = 0

SPACE = HyperparameterSpace([Hyperparameter("rate", init=0.2, low=0.0, high=0.9), Hyperparameter("decay", init=1.0)])
LAYERS = {
    "linear": (lambda rank: HyperLinear(6, 5, num_hyperparameters=2, response_rank=rank), lambda: torch.randn(3, 6)),
    "conv2d": (
        lambda rank: HyperConv2d(4, 6, 3, 2, 1, groups=2, relu=True, num_hyperparameters=2, response_rank=rank),
        lambda: torch.randn(3, 4, 7, 5),
    ),
    "batch norm": (
        lambda rank: HyperBatchNorm2d(4, num_hyperparameters=2),
        lambda: torch.randn(3, 4, 7, 5),
    ),
    "embedding": (
        lambda rank: HyperEmbedding(11, 5, 2, num_hyperparameters=2, response_rank=rank),
        lambda: torch.randint(11, (3, 4)),
    ),
    "lstm": (
        lambda rank: HyperLSTM(6, 5, batch_first=True, bidirectional=True, num_hyperparameters=2, response_rank=rank),
        lambda: torch.randn(3, 4, 6),
    ),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def layer_and_input(name, rank=None):
    torch.manual_seed(0)
    make, draw = LAYERS[name]
    return respond(make(rank)), draw()


def perturbed():
    location, raw_scale = SPACE.initial_state()
    return SPACE.sample(location, raw_scale, batch_size=3, seed=0, step=0, center=location)


@each_layer
def test_a_centred_layer_is_the_plain_one_and_asks_for_no_gradient_of_the_response(name):
    layer, x = layer_and_input(name)
    hyper = SPACE.at(SPACE.initial_state()[0], batch_size=3, centred=True)
    y = first(layer(x, hyper))
    plain = layer.fold(torch.zeros(2))
    torch.testing.assert_close(y, first(plain(x)), rtol=0, atol=1e-6)
    y.sum().backward()
    with_gradients = {n for n, p in layer.named_parameters() if p.grad is not None}
    assert with_gradients == {name for name, _ in layer.named_parameters() if not is_response(name)}


@pytest.mark.parametrize("rank", [None, 1], ids=["full", "low rank"])
@each_layer
def test_a_linearised_layer_returns_its_plain_output_and_the_tangent_of_its_definition(name, rank):
    layer, x = layer_and_input(name, rank)
    hyper = perturbed()
    with torch.no_grad(), forward_ad.dual_level():
        z, dz = tangents.split(first(layer(x, hyper.linearised())))
    at_zero = SPACE.at(SPACE.initial_state()[0], batch_size=3, centred=True)
    torch.testing.assert_close(z, first(layer(x, at_zero)), rtol=0, atol=1e-6)
    eps = 1e-6
    layer, x = layer.double(), x.double() if x.is_floating_point() else x
    h = hyper.response.double()
    with torch.no_grad():
        difference = (first(layer(x, eps * h)) - first(layer(x, -eps * h))) / (2 * eps)
    assert relative_error(dz, difference) < 1e-5


@each_layer
def test_slices_of_a_linearised_batch_have_the_tangents_of_their_examples(name):
    layer, x = layer_and_input(name)
    layer.eval()  # in training mode, batch norm makes examples depend on each other
    with torch.no_grad(), forward_ad.dual_level():
        hyper = perturbed().linearised()
        whole = tangents.split(first(layer(x, hyper)))
        part = tangents.split(first(layer(x[1:], hyper[1:])))
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[1:], other)


def test_weights_of_an_lstm_must_not_ask_for_gradients_beside_tangents():
    layer, x = layer_and_input("lstm")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="set requires_grad to False"):
        layer(x, perturbed().linearised())


@pytest.mark.parametrize("name", ["linear", "conv2d", "lstm"])
def test_empty_batches_have_tangents(name):
    layer, x = layer_and_input(name)
    location, raw_scale = SPACE.initial_state()
    with torch.no_grad(), forward_ad.dual_level():
        hyper = SPACE.sample(location, raw_scale, batch_size=0, seed=0, step=0, center=location).linearised()
        z, dz = tangents.split(first(layer(x[:0], hyper)))
    assert z.shape == dz.shape == first(layer(x, perturbed()))[:0].shape


@each_layer
def test_derivatives_at_h_0_are_those_of_the_definition_in_other_modes_too(name):
    """Of a weight, forward; of the response itself, in reverse."""
    layer, x = layer_and_input(name)
    layer.eval()
    weight = next(n for n, _ in layer.named_parameters() if n.startswith("weight"))
    along = torch.randn_like(layer.get_parameter(weight))
    hypers = [SPACE.at(SPACE.initial_state()[0], batch_size=3, centred=c) for c in (True, False)]

    def at(hyper):
        return lambda w: first(torch.func.functional_call(layer, {weight: w}, (x, hyper)))

    of_weight = [torch.func.jvp(at(hyper), (layer.get_parameter(weight),), (along,))[1] for hyper in hypers]
    torch.testing.assert_close(*of_weight)
    assert of_weight[0].abs().sum() > 0
    of_response = [
        torch.func.grad(lambda h, hyper=hyper: first(layer(x, replace(hyper, response=h))).square().sum())(
            hyper.response
        )
        for hyper in hypers
    ]
    torch.testing.assert_close(*of_response)
    assert of_response[0].abs().sum() > 0


def test_a_center_and_centred_contradict_each_other():
    location, _ = SPACE.initial_state()
    with pytest.raises(ValueError, match="either center or centred"):
        SPACE.at(location, batch_size=2, center=location, centred=True)


def test_a_linearised_batch_needs_a_dual_level():
    with pytest.raises(RuntimeError, match="dual"):
        perturbed().linearised()


def test_dropout_and_noise_of_a_dual_tensor_draw_once_more_what_they_drew():
    x, dx = torch.randn(2, 5, 400)
    rate, draw = torch.full((5,), 0.4), dict(seed=3, step=2, stream=1)
    with forward_ad.dual_level():
        dropped = tangents.split(functional.dropout(tangents.dual(x, dx), rate, **draw))
        noisy = tangents.split(functional.noise(tangents.dual(x, dx), rate, **draw))
    assert torch.equal(dropped[0], functional.dropout(x, rate, **draw))
    assert torch.equal(dropped[1], functional.dropout(dx, rate, **draw))
    assert torch.equal(noisy[0], functional.noise(x, rate, **draw))
    assert torch.equal(noisy[1], dx)
