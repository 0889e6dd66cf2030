"""The C++ core's epilogue of gated convolutions against float64 arithmetic written here."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stn_fast import _C

# (joined, q_last, y_last): two convolutions or one, and whose channels come last
LAYOUTS = [(joined, *lasts) for joined in (False, True) for lasts in ((False, False), (True, False), (True, True))]


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def poisoned(*shape):
    return torch.full(shape, float("nan"))


class Epilogue:
    """P, Q, dy (batch, groups, outputs, pixels) and gates of one layer, and what becomes of them in float64."""

    def __init__(self, batch, groups, outputs, pixels, layout, shifted=True, relu=False):
        generator = torch.Generator().manual_seed(0)
        self.sizes, self.layout, self.relu = (batch, groups, outputs, pixels), layout, relu
        self.p, self.q, self.dy = (torch.randn(self.sizes, generator=generator) for _ in range(3))
        self.scale, self.shift = (torch.randn(batch, groups, outputs, generator=generator) for _ in range(2))
        self.shift = self.shift if shifted else None

    def exact_y(self):
        y = self.p.double() + self.scale.double()[..., None] * self.q.double()
        y = y if self.shift is None else y + self.shift.double()[..., None]
        return y.clamp_min(0) if self.relu else y

    def branches(self, p, q):
        """P and Q as the core finds them: the tensor that holds P, and the address of Q."""
        joined, last, _ = self.layout
        if not joined:
            p, q = self.laid_out(p, last), self.laid_out(q, last)
            return p, q, q.data_ptr()
        both = torch.stack([p, q], dim=2)  # (batch, groups, 2, outputs, pixels)
        both = both.permute(0, 4, 1, 2, 3).contiguous() if last else both.contiguous()
        return both, both, both.data_ptr() + 4 * self.sizes[2] * (1 if last else self.sizes[3])

    def laid_out(self, images, last):
        """(batch, groups, outputs, pixels) as it lies in memory: pixels last, or channels."""
        return images.permute(0, 3, 1, 2).contiguous() if last else images.contiguous()

    def read(self, memory, last):
        return memory.view(self.sizes[0], self.sizes[3], *self.sizes[1:3]).permute(0, 2, 3, 1) if last else memory

    def forward(self, copies, threads=1):
        _, last, y_last = self.layout
        p, _held, q = self.branches(self.p, self.q)
        y, q_copy = poisoned(*self.sizes), poisoned(*self.sizes) if copies else None
        _C.channel_epilogue_forward(
            address(p), q, address(self.scale), address(self.shift), address(y), address(q_copy), *self.sizes,
            *self.layout, self.relu, threads,
        )  # fmt: skip
        return self.read(y.flatten(), y_last) if y_last else y, self.read(q_copy, last) if copies else None

    def backward(self, wanted=(True,) * 4, threads=1):
        """d_p, d_q, d_scale, d_shift, of which the wanted ones; `relu` masks by the exact result."""
        joined, last, y_last = self.layout
        batch, groups, outputs, pixels = self.sizes
        y = self.laid_out(self.exact_y().float(), y_last) if self.relu else None
        d_p, holder, d_q = self.branches(poisoned(*self.sizes), poisoned(*self.sizes))
        d_scale, d_shift = poisoned(batch, groups, outputs), poisoned(batch, groups, outputs)
        dy, q = self.laid_out(self.dy, y_last), self.laid_out(self.q, last)
        _C.channel_epilogue_backward(
            address(dy), address(y), address(q) if wanted[2] else 0, address(self.scale),
            address(d_p) if wanted[0] else 0, d_q if wanted[1] else 0, address(d_scale) if wanted[2] else 0,
            address(d_shift) if wanted[3] else 0, *self.sizes, *self.layout, threads,
        )  # fmt: skip
        if joined:
            halves = d_p.view(batch, pixels, groups, 2, outputs).permute(0, 2, 3, 4, 1) if last else d_p
            d_p, d_q = halves[:, :, 0], halves[:, :, 1]
        else:
            d_p, d_q = self.read(d_p, last), self.read(holder, last)
        return d_p, d_q, d_scale, d_shift

    def exact_gradients(self):
        """The same in float64, and the size of the terms that each number sums up."""
        g = self.dy.double() * (self.exact_y().float() > 0) if self.relu else self.dy.double()
        q, scale = self.q.double(), self.scale.double()[..., None]
        exact = g, g * scale, (g * q).sum(-1), g.sum(-1)
        return exact, (g.abs(), (g * scale).abs(), (g * q).abs().sum(-1), g.abs().sum(-1))


epilogues = st.builds(
    Epilogue,
    batch=st.integers(1, 4),
    groups=st.integers(1, 3),
    outputs=st.one_of(st.integers(1, 20), st.integers(250, 270)),
    pixels=st.one_of(st.integers(1, 40), st.integers(1020, 1030)),
    layout=st.sampled_from(LAYOUTS),
    shifted=st.booleans(),
    relu=st.booleans(),
)


@settings(deadline=None, max_examples=60)
@given(layer=epilogues, copies=st.booleans())
def test_forward_of_any_shape_and_layout_matches_float64(layer, copies):
    y, q_copy = layer.forward(copies)
    size = layer.p.abs() + (layer.scale[..., None] * layer.q).abs() + 5
    assert ((y.double() - layer.exact_y()).abs() <= 3e-7 * size).all()
    assert q_copy is None or torch.equal(q_copy, layer.q)


@settings(deadline=None, max_examples=60)
@given(layer=epilogues)
def test_backward_of_any_shape_and_layout_matches_float64(layer):
    names = ("p", "q", "scale", "shift")
    for name, got, exact, size in zip(names, layer.backward(), *layer.exact_gradients(), strict=True):
        assert ((got.double() - exact).abs() <= 1e-6 * size).all(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_every_subset_of_results_is_the_same_and_nothing_else_is_written(layout, relu):
    layer = Epilogue(2, 2, 19, 21, layout, relu=relu)
    everything = layer.backward()
    for wanted in itertools.product([False, True], repeat=4):
        for wants, got, want in zip(wanted, layer.backward(wanted), everything, strict=True):
            assert torch.equal(got, want) if wants else got.isnan().all()


@pytest.mark.parametrize("last", [False, True])
def test_the_result_may_overwrite_p(last):
    layer = Epilogue(3, 1, 37, 50, (False, last, last))
    want, _ = layer.forward(False)
    p, q = layer.laid_out(layer.p, last), layer.laid_out(layer.q, last)
    _C.channel_epilogue_forward(
        address(p), address(q), address(layer.scale), address(layer.shift), address(p), 0, *layer.sizes, *layer.layout,
        False, 1,
    )  # fmt: skip
    assert torch.equal(layer.read(p, last), want)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    layer = Epilogue(5, 1, 300, 1100, layout, relu=True)
    one, several = ([*layer.forward(True, t), *layer.backward(threads=t)] for t in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(0, 3), rows=st.integers(0, 70), columns=st.integers(0, 70), threads=st.integers(1, 2))
def test_transpose_moves_every_number(batch, rows, columns, threads):
    images, to = torch.randn(batch, rows, columns), poisoned(batch, columns, rows)
    _C.transpose(address(images), address(to), batch, rows, columns, threads)
    assert torch.equal(to, images.transpose(1, 2))


def test_transpose_of_many_numbers_in_threads():
    images, to = torch.randn(3, 257, 1025), poisoned(3, 1025, 257)
    _C.transpose(address(images), address(to), 3, 257, 1025, 2)
    assert torch.equal(to, images.transpose(1, 2))
