"""The C++ core's pass around a time step of a gated LSTM, against float64 arithmetic written here."""

import math

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast import _C


def cell_forward(gates, p, q, scale, shift, c_before, threads=1):
    """Activated gates, c and h."""
    gates, c, h = gates.clone(), torch.full_like(c_before, math.nan), torch.full_like(c_before, math.nan)
    # Rows of P are followed by others, as those of [P, u] are.
    p, response = torch.cat([p, torch.full((len(p), 3), math.nan)], dim=1), torch.full_like(q, math.nan)
    tensors = gates, p, q, scale, shift, c_before, c, h, response
    rows = p.stride(0), q.stride(0)
    _C.gated_lstm_cell_forward(*(0 if t is None else t.data_ptr() for t in tensors), *rows, *c.shape, threads)
    assert torch.equal(response, q)
    return gates, c, h


def cell_backward(dy, dh, dc, gates, c, c_before, scale, threads=1):
    """d_gates, d_gates ⊙ scale and the gradient of c_before."""
    d_c, d_gates = dc.clone(), torch.full_like(gates, math.nan)
    wide = gates.shape[1]
    d_p, d_q = torch.full((len(gates), wide + 3), math.nan), torch.full_like(gates, math.nan)
    tensors = dy, dh, d_c, gates, c, c_before, scale, d_gates, d_p, d_q
    rows = d_p.stride(0), d_q.stride(0)
    _C.gated_lstm_cell_backward(*(0 if t is None else t.data_ptr() for t in tensors), *rows, *c.shape, threads)
    assert torch.equal(d_p[:, :wide], d_gates)
    assert d_p[:, wide:].isnan().all()
    return d_gates, d_q, d_c


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
    d_gates, d_q, d_c = cell_backward(dy, dh if more else None, dc, gates, c, c_before, scale)
    for three in zip((d_gates, d_q, d_c), in_torch(torch.float32), in_torch(torch.float64), strict=True):
        assert_twice_as_good(*three)


def test_results_do_not_depend_on_the_number_of_threads():
    batch, hidden = SIZES[-1]
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(batch, 4 * hidden, generator=generator) for _ in range(5)]
    c_before, dy, dh, dc = (torch.randn(batch, hidden, generator=generator) for _ in range(4))
    runs = []
    for threads in (1, 2, 3):
        gates, c, h = cell_forward(*wide, c_before, threads)
        runs.append((gates, c, h, *cell_backward(dy, dh, dc, gates, c, c_before, wide[3], threads)))
    for other in runs[1:]:
        assert all(map(torch.equal, other, runs[0]))
