"""The C++ core's gated epilogue against float64 arithmetic written here."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_fast import _C


def poisoned(*shape):
    return torch.full(shape, float("nan"))


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def normals(generator, *shape):
    return torch.randn(*shape, generator=generator)


GRADIENTS = ("g", "d_weight_gate", "d_bias", "d_response_bias", "d_bias_gate", "d_h")


class Epilogue:
    """One gated layer's P, Q, dy and gates, and what becomes of them in float64."""

    def __init__(self, outer, batch, inner, outputs, n, bias=True):
        generator, rows = torch.Generator().manual_seed(0), outer * batch * inner
        self.sizes = outer, batch, inner, outputs, n
        self.p, self.q, self.dy = (normals(generator, rows, outputs) for _ in range(3))
        self.h, self.weight_gate = normals(generator, batch, n), normals(generator, outputs, n)
        self.bias = normals(generator, outputs) if bias else None
        self.response_bias = normals(generator, outputs) if bias else None
        self.bias_gate = normals(generator, outputs, n) if bias else None
        self.example = torch.arange(rows) // max(inner, 1) % max(batch, 1)

    def absolute(self):
        """The same layer with every number's sign dropped, so that nothing cancels."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(other, name, value.abs())
        return other

    def exact_forward(self):
        h = self.h.double()[self.example]
        y = self.p.double() + (h @ self.weight_gate.double().T) * self.q.double()
        if self.bias is not None:
            y += self.bias.double() + (h @ self.bias_gate.double().T) * self.response_bias.double()
        return y

    def exact_gradients(self):
        h, q, dy = self.h.double()[self.example], self.q.double(), self.dy.double()
        by_row = (dy * q) @ self.weight_gate.double()
        gradients = {"g": dy * (h @ self.weight_gate.double().T), "d_weight_gate": (dy * q).T @ h}
        if self.bias is not None:
            bias_gate, response_bias = self.bias_gate.double(), self.response_bias.double()
            gradients["d_bias"] = dy.sum(0)
            gradients["d_response_bias"] = (dy * (h @ bias_gate.T)).sum(0)
            gradients["d_bias_gate"] = (dy * response_bias).T @ h
            by_row = by_row + (dy * response_bias) @ bias_gate
        gradients["d_h"] = torch.zeros(self.h.shape, dtype=torch.float64).index_add(0, self.example, by_row)
        return gradients

    def forward(self, threads=1):
        y = self.p.clone()
        gates = self.h, self.weight_gate, self.bias, self.response_bias, self.bias_gate
        _C.gated_epilogue_forward(*map(address, (y, self.q, *gates)), *self.sizes, threads)
        return y

    def backward(self, wanted=GRADIENTS, threads=1):
        shapes = {name: gradient.shape for name, gradient in self.exact_gradients().items()}
        out = {name: poisoned(*shapes[name]) if name in wanted and name in shapes else None for name in GRADIENTS}
        q = self.q if "d_weight_gate" in wanted or "d_h" in wanted else None
        inputs = self.dy, q, self.h, self.weight_gate, self.response_bias, self.bias_gate
        _C.gated_epilogue_backward(*map(address, (*inputs, *out.values())), *self.sizes, False, threads)
        return {name: gradient for name, gradient in out.items() if gradient is not None}


def assert_close_as_sums(got, layer):
    """Every element within rounding of float64, measured against the sum of its terms' absolute values."""
    exact, magnitude = (of.exact_gradients() | {"y": of.exact_forward()} for of in (layer, layer.absolute()))
    for name, tensor in got.items():
        error = (tensor.double() - exact[name]).abs()
        assert (error <= 1e-6 * magnitude[name]).all(), name


epilogues = st.builds(
    Epilogue,
    outer=st.integers(1, 3),
    batch=st.integers(1, 40),
    inner=st.integers(1, 4),
    outputs=st.one_of(st.integers(1, 40), st.integers(120, 300)),
    n=st.integers(1, 20),
    bias=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(layer=epilogues)
def test_gated_epilogue_of_any_shape_matches_float64(layer):
    assert_close_as_sums({"y": layer.forward()}, layer)


@settings(deadline=None, max_examples=60)
@given(layer=epilogues)
def test_every_gated_gradient_of_any_shape_matches_float64(layer):
    assert_close_as_sums(layer.backward(), layer)


@pytest.mark.parametrize("bias", [True, False])
def test_every_subset_of_gated_gradients_is_right(bias):
    layer = Epilogue(2, 11, 3, 150, 5, bias)
    exact = layer.exact_gradients()
    for size in range(len(GRADIENTS) + 1):
        for wanted in itertools.combinations(GRADIENTS, size):
            got = layer.backward(wanted)
            assert set(got) == set(wanted) & set(exact)
            assert_close_as_sums(got, layer)


@pytest.mark.parametrize("wanted", [GRADIENTS, GRADIENTS[:-1], ("g", "d_h")], ids=["all", "training", "validation"])
@pytest.mark.parametrize("sizes", [(1, 701, 1, 300, 15), (7, 40, 1, 650, 7), (1, 37, 49, 33, 3)])
def test_gated_epilogue_does_not_depend_on_the_number_of_threads(sizes, wanted):
    layer = Epilogue(*sizes)
    forward, backward = layer.forward(), layer.backward(wanted)
    for threads in (2, 3):
        assert torch.equal(layer.forward(threads), forward)
        assert all(torch.equal(gradient, backward[name]) for name, gradient in layer.backward(wanted, threads).items())
    assert_close_as_sums(backward | {"y": forward}, layer)


@pytest.mark.parametrize("sizes", [(1, 0, 1, 5, 3), (1, 4, 0, 5, 3), (0, 4, 1, 5, 3), (1, 4, 1, 0, 3)])
def test_gradients_of_no_positions_or_no_outputs_are_zero(sizes):
    for name, gradient in Epilogue(*sizes).backward().items():
        assert torch.equal(gradient, torch.zeros(gradient.shape)), name
    guard = torch.full((64,), 7.0)
    _C.gated_epilogue_forward(*[guard.data_ptr()] * 7, *sizes, 2)
    assert (guard == 7).all()
