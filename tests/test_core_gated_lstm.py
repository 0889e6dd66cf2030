"""The C++ core's pass around a time step of a gated LSTM, against float64 arithmetic written here."""

import math

import pytest
import torch
from numerics import assert_twice_as_good

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


def cell(before, c_before):
    """Activated gates, c and h of what the activations are applied to, in plain torch."""
    i, f, g, o = before.chunk(4, dim=1)
    gates = torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], dim=1)
    i, f, g, o = gates.chunk(4, dim=1)
    c = f * c_before + i * g
    return gates, c, o * c.tanh()


# Not (1, 1): where terms of a single number cancel, a rounding of theirs is no small part of it.
SIZES = [(9, 1), (3, 5), (2, 257), (70, 261)]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("batch", "hidden"), SIZES)
def test_forward_computes_the_cell(batch, hidden, shift):
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(batch, 4 * hidden, generator=generator) for _ in range(5)]
    c_before = torch.randn(batch, hidden, generator=generator)

    def in_torch(dtype):
        gates, p, q, scale, added = (t.to(dtype) for t in wide)
        before = gates + p + scale * q
        return cell(before + added if shift else before, c_before.to(dtype))

    got = cell_forward(*wide[:4], wide[4] if shift else None, c_before)
    for three in zip(got, in_torch(torch.float32), in_torch(torch.float64), strict=True):
        assert_twice_as_good(*three)


@pytest.mark.parametrize("more", [True, False])
@pytest.mark.parametrize(("batch", "hidden"), SIZES)
def test_backward_is_the_gradient_of_the_cell(batch, hidden, more):
    """`more` says whether the gradient of h comes from a later time step too."""
    generator = torch.Generator().manual_seed(0)
    before, scale = (torch.randn(batch, 4 * hidden, generator=generator) for _ in range(2))
    c_before, dy, dh, dc = (torch.randn(batch, hidden, generator=generator) for _ in range(4))

    def in_torch(dtype):
        leaves = before.to(dtype).requires_grad_(), c_before.to(dtype).requires_grad_()
        incoming = dc.to(dtype), (dy.to(dtype) + dh.to(dtype) if more else dy.to(dtype))
        d_before, d_c = torch.autograd.grad(cell(*leaves)[1:], leaves, incoming)
        return d_before, d_before * scale.to(dtype), d_c

    zero = torch.zeros_like(before)
    gates, c, _ = cell_forward(before, zero, zero, zero, None, c_before)
    d_gates, d_q, d_c = torch.full_like(before, math.nan), torch.full_like(before, math.nan), dc.clone()
    _C.gated_lstm_cell_backward(
        dy.data_ptr(), dh.data_ptr() if more else 0, d_c.data_ptr(), gates.data_ptr(), c.data_ptr(),
        c_before.data_ptr(), scale.data_ptr(), d_gates.data_ptr(), d_q.data_ptr(), batch, hidden, 1,
    )  # fmt: skip
    for three in zip((d_gates, d_q, d_c), in_torch(torch.float32), in_torch(torch.float64), strict=True):
        assert_twice_as_good(*three)
