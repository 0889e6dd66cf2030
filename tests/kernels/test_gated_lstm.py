"""The recurrence of gated LSTMs, every way to compute it, against plain torch in float64."""

import pytest
import torch
from numerics import assert_twice_as_good

from stn_fast.kernels import gated_lstm as kernels
from stn_fast.kernels import gated_lstm_sequence as sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("gates", "h_0", "c_0")
# T, B, H
SHAPES = [(4, 5, 7), (1, 3, 16), (3, 17, 33)]
CONFIGS = {sequence.config_name(c): c for c in (*sequence.HOPPER_CONFIGS, *sequence.AMPERE_CONFIGS)}
SMALL = sequence.AMPERE_CONFIGS[0]


def operands(steps, batch, hidden, dtype, bias=True):
    """x's share, h_0, c_0, W, R, scale, shift, and the gradients of y and c_n, drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(steps + batch + hidden)
    wide = 4 * hidden
    shapes = [(steps, batch, wide), (batch, hidden), (batch, hidden), (wide, hidden), (wide, hidden), (batch, wide)]
    shapes += [(batch, wide), (steps, batch, hidden), (batch, hidden)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for i in (3, 4):
        drawn[i] *= hidden**-0.5
    *tensors, dy, d_last_cell = (t.to(dtype) for t in drawn)
    return [*tensors[:6], tensors[6] if bias else None], (dy, d_last_cell)


def plain(share, h, c, weight, response_weight, scale, shift, reverse=False):
    """y, c_n and what is kept: activated gates, cell states, Q."""
    ys, gates, cells, responses = [], [], [], []
    for x in share.unbind(0)[:: -1 if reverse else 1]:
        q = h @ response_weight.T
        before = x + h @ weight.T + scale * q + (0 if shift is None else shift)
        i, f, g, o = before.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        for kept, one in zip((ys, gates, cells, responses), (h, torch.cat([i, f, g, o], -1), c, q), strict=True):
            kept.append(one)
    y, *kept = (torch.stack(one[:: -1 if reverse else 1]) for one in (ys, gates, cells, responses))
    return y, c, *kept


def differentiated(tensors, incoming, dtype, reverse):
    """What `plain` gives in this dtype, and the gradients of NAMES."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_(i < 3) for i, t in enumerate(tensors)]
    results = plain(*leaves, reverse=reverse)
    used, given = zip(
        *((r, d.to(dtype)) for r, d in zip(results, incoming, strict=False) if d is not None), strict=True
    )
    return results, torch.autograd.grad(used, leaves[:3], given)


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def ran(tensors, config, reverse=False, save=True, save_response=True):
    """y, c_n and what is kept, from a copy of x's share, which becomes the gates."""
    share, *rest = on_device(*tensors)
    gates = share.clone()
    y, c_n, cells, response = kernels.forward(gates, *rest, reverse, save, save_response, config=config)
    return y, c_n, gates, cells, response


def ran_backward(tensors, incoming, kept, config, reverse=False, want_h_0=True):
    _, _, c_0, weight, response_weight, scale, _ = on_device(*tensors)
    gates, cells = kept
    return kernels.backward(
        *on_device(*incoming), gates, cells, c_0, weight, response_weight, scale, reverse, want_h_0, config=config
    )


def assert_right(tensors, incoming, config, reverse=False):
    (exact, exact_gradients), (in_dtype, gradients) = (
        differentiated(tensors, incoming, d, reverse) for d in (torch.float64, tensors[0].dtype)
    )
    got = ran(tensors, config, reverse)
    for name, *three in zip(("y", "c_n", "gates", "cells", "response"), got, in_dtype, exact, strict=True):
        assert three[0].dtype == tensors[0].dtype
        assert_twice_as_good(*three, name=name)
    for name, *three in zip(
        NAMES, ran_backward(tensors, incoming, got[2:4], config, reverse), gradients, exact_gradients, strict=True
    ):
        assert_twice_as_good(*three, name=name)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_obeys_the_2x_rule_step_by_step(shape, dtype, bias, reverse):
    assert_right(*operands(*shape, dtype, bias), "steps", reverse)


@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_obeys_the_2x_rule_in_one_launch(shape, dtype, reverse):
    assert_right(*operands(*shape, dtype, bias=not reverse), SMALL, reverse)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_obeys_the_2x_rule(config):
    assert_right(*operands(2, 33, 40, torch.bfloat16), CONFIGS[config])


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1), (3, 2, 130)], ids=str)
@pytest.mark.parametrize("config", ["steps", "one launch"])
def test_sizes_of_one_and_long_rows_are_right(config, shape):
    """In float32: of two 16-bit results of a few numbers, either may be by far the closer by chance."""
    assert_right(*operands(*shape, torch.float32), config if config == "steps" else SMALL)
