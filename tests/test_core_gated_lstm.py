"""The C++ core's pass around a time step of a gated LSTM, against float64 arithmetic written here."""

import math

import pytest
import torch
from numerics import relative_error

from stn_fast import _C


def cell_forward(gates, p, q, scale, shift, c_before):
    """Activated gates, c and h."""
    gates, c, h = gates.clone(), torch.full_like(c_before, math.nan), torch.full_like(c_before, math.nan)
    address = 0 if shift is None else shift.data_ptr()
    pointers = [t.data_ptr() for t in (gates, p, q, scale)]
    _C.gated_lstm_cell_forward(*pointers, address, *(t.data_ptr() for t in (c_before, c, h)), *c.shape, 1)
    return gates, c, h


def activated(values):
    """sigmoid (i, f, o) and tanh (g) of the same float32 numbers, as the core computes them."""
    wide = values.repeat(4)[None].contiguous()
    zero = torch.zeros_like(wide)
    gates, *_ = cell_forward(wide, zero, zero, zero, None, torch.zeros(1, len(values)))
    return gates[0].chunk(4)


def ulps(got, exact):
    want = exact.float()
    spacing = torch.nextafter(want.abs(), torch.tensor(math.inf)) - want.abs()
    return ((got.double() - exact).abs() / spacing.double()).max().item()


def test_activations_are_as_exact_as_stated():
    small = torch.logspace(-30, 0, 100_000)
    values = torch.cat([-small, small, torch.linspace(-80, 80, 400_001), torch.linspace(-1, 1, 100_001)])
    i, f, g, o = activated(values)
    exact = values.double()
    for gate in (i, f, o):
        assert ulps(gate, exact.sigmoid()) <= 2.1
    assert ulps(g, exact.tanh()) <= 2


def test_activations_saturate_at_infinity_and_keep_nan():
    i, f, g, o = activated(torch.tensor([math.inf, -math.inf, 200.0, -200.0, 3e38, -3e38, math.nan]))
    for gate in (i, f, o):
        assert gate[:6].tolist() == [1, 0] * 3
    assert g[:6].tolist() == [1, -1] * 3
    assert all(gate[6].isnan() for gate in (i, f, g, o))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 1), (3, 5), (2, 257), (70, 261)])
def test_forward_computes_the_cell(batch, hidden, shift):
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(batch, 4 * hidden, generator=generator) for _ in range(5)]
    c_before = torch.randn(batch, hidden, generator=generator)
    if not shift:
        wide[4] = None
    gates, p, q, scale, added = (None if t is None else t.double() for t in wide)
    i, f, g, o = (gates + p + scale * q + (added if shift else 0)).chunk(4, dim=1)
    c = f.sigmoid() * c_before.double() + i.sigmoid() * g.tanh()
    got = cell_forward(*wide, c_before)
    want = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=1), c, o.sigmoid() * c.tanh()
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) < 3e-7


@pytest.mark.parametrize("dh", [True, False])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 1), (3, 5), (2, 257), (70, 261)])
def test_backward_is_the_gradient_of_the_cell(batch, hidden, dh):
    generator = torch.Generator().manual_seed(0)
    before, scale = (torch.randn(batch, 4 * hidden, generator=generator) for _ in range(2))
    c_before, dy, more, dc = (torch.randn(batch, hidden, generator=generator) for _ in range(4))
    exact, exact_c = before.double().requires_grad_(), c_before.double().requires_grad_()
    i, f, g, o = exact.chunk(4, dim=1)
    c = f.sigmoid() * exact_c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    incoming = [dc.double(), (dy + more if dh else dy).double()]
    want, want_c = torch.autograd.grad((c, h), (exact, exact_c), incoming)

    zero = torch.zeros_like(before)
    gates, c32, _ = cell_forward(before, zero, zero, zero, None, c_before)
    d_gates, d_q, got_c = torch.full_like(before, math.nan), torch.full_like(before, math.nan), dc.clone()
    _C.gated_lstm_cell_backward(
        dy.data_ptr(), more.data_ptr() if dh else 0, got_c.data_ptr(), gates.data_ptr(), c32.data_ptr(),
        c_before.data_ptr(), scale.data_ptr(), d_gates.data_ptr(), d_q.data_ptr(), batch, hidden, 1,
    )  # fmt: skip
    assert relative_error(d_gates, want) < 1e-6
    assert relative_error(d_q, want * scale.double()) < 1e-6
    assert relative_error(got_c, want_c) < 1e-6
