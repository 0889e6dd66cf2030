"""Weight decay of a layer whose weights differ from example to example: its penalty and gradients, a pass for each.

With a = ‖W_o‖², c = ⟨W_o, R_o⟩, q = ‖R_o‖² of a row o, and the moments m = Σ decay[b] / B, v = Σ decay[b] h[b] / B and
M = Σ decay[b] h[b] h[b]ᵀ / B, a row's penalty is ½ (m a + 2 (v·g) c + (gᵀ M g) q) with g = Gw_o.

One program works on one row. Kernels hold moments of up to gates.MAX_N hyperparameters in registers.
"""
# ruff: noqa: E741 (O outputs, I numbers of a row)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import padded
from .launch import device_guard, narrow

BLOCK_B = 32
NUM_WARPS = 4


@triton.jit
def decay_moments_kernel(
    p_h, p_decay, p_moments, batch, n, N_PAD: tl.constexpr, BLOCK_B: tl.constexpr
):  # fmt: skip
    """v in the first n numbers, M in the next n², then m."""
    i_n = tl.arange(0, N_PAD)
    in_n = i_n < n
    b_v = tl.zeros((N_PAD,), tl.float32)
    b_m = tl.zeros((BLOCK_B,), tl.float32)
    b_square = tl.zeros((N_PAD, N_PAD), tl.float32)
    for first in range(0, batch, BLOCK_B):
        i_b = first + tl.arange(0, BLOCK_B)
        in_b = i_b < batch
        inside = in_b[:, None] & in_n[None, :]
        b_h = tl.load(p_h + i_b.to(tl.int64)[:, None] * n + i_n[None, :], mask=inside, other=0.0).to(tl.float32)
        b_decay = tl.load(p_decay + i_b, mask=in_b, other=0.0).to(tl.float32)
        b_weighted = b_h * b_decay[:, None]
        b_m += b_decay
        b_v += tl.sum(b_weighted, axis=0)
        b_square = tl.dot(tl.trans(b_weighted), b_h, b_square, input_precision="ieee")
    tl.store(p_moments + i_n, b_v / batch, mask=in_n)
    i_square = n + i_n[:, None] * n + i_n[None, :]
    tl.store(p_moments + i_square, b_square / batch, mask=in_n[:, None] & in_n[None, :])
    tl.store(p_moments + n + n * n, tl.sum(b_m, axis=0) / batch)


@triton.jit
def load_moments(p_moments, p_gate, i_o, n, N_PAD: tl.constexpr):
    """m, v, M g, v·g and gᵀ M g of row i_o."""
    i_n = tl.arange(0, N_PAD)
    in_n = i_n < n
    b_gate = tl.load(p_gate + i_o * n + i_n, mask=in_n, other=0.0).to(tl.float32)
    b_v = tl.load(p_moments + i_n, mask=in_n, other=0.0)
    i_square = n + i_n[:, None] * n + i_n[None, :]
    b_square = tl.load(p_moments + i_square, mask=in_n[:, None] & in_n[None, :], other=0.0)
    b_product = tl.sum(b_square * b_gate[None, :], axis=1)
    mean = tl.load(p_moments + n + n * n)
    return mean, b_v, b_product, tl.sum(b_v * b_gate, axis=0), tl.sum(b_product * b_gate, axis=0)


@triton.jit
def weight_decay_fwd_kernel(
    p_weight, p_response_weight, p_gate, p_moments, p_rows, p_penalty, I, n, N_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keeps c and q of every row."""
    i_o = tl.program_id(0).to(tl.int64)
    b_a = tl.zeros((BLOCK,), tl.float32)
    b_c = tl.zeros((BLOCK,), tl.float32)
    b_q = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, I, BLOCK):
        i_i = first + tl.arange(0, BLOCK)
        b_weight = tl.load(p_weight + i_o * I + i_i, mask=i_i < I, other=0.0).to(tl.float32)
        b_response = tl.load(p_response_weight + i_o * I + i_i, mask=i_i < I, other=0.0).to(tl.float32)
        b_a += b_weight * b_weight
        b_c += b_weight * b_response
        b_q += b_response * b_response
    c, q = tl.sum(b_c, axis=0), tl.sum(b_q, axis=0)
    mean, _, _, first_order, second_order = load_moments(p_moments, p_gate, i_o, n, N_PAD)
    tl.store(p_rows + 2 * i_o, c)
    tl.store(p_rows + 2 * i_o + 1, q)
    tl.store(p_penalty + i_o, 0.5 * (mean * tl.sum(b_a, axis=0) + 2.0 * first_order * c + second_order * q))


@triton.jit
def weight_decay_bwd_kernel(
    p_d_penalty,
    p_weight,
    p_response_weight,
    p_gate,
    p_moments,
    p_rows,
    p_d_weight,
    p_d_response_weight,
    p_d_gate,
    I,
    n,
    WANT_WEIGHT: tl.constexpr,
    WANT_RESPONSE: tl.constexpr,
    WANT_GATE: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dW = m W + (v·g) R, dR = (v·g) W + (gᵀ M g) R, dg = c v + q M g, all times the gradient of the penalty."""
    i_o = tl.program_id(0).to(tl.int64)
    gradient = tl.load(p_d_penalty).to(tl.float32)
    mean, b_v, b_product, first_order, second_order = load_moments(p_moments, p_gate, i_o, n, N_PAD)
    if WANT_GATE:
        i_n = tl.arange(0, N_PAD)
        b_d_gate = gradient * (tl.load(p_rows + 2 * i_o) * b_v + tl.load(p_rows + 2 * i_o + 1) * b_product)
        tl.store(p_d_gate + i_o * n + i_n, narrow(b_d_gate, p_d_gate.dtype.element_ty), mask=i_n < n)
    if WANT_WEIGHT or WANT_RESPONSE:
        for first in range(0, I, BLOCK):
            i_i = first + tl.arange(0, BLOCK)
            inside = i_i < I
            i_row = i_o * I + i_i
            b_weight = tl.load(p_weight + i_row, mask=inside, other=0.0).to(tl.float32)
            b_response = tl.load(p_response_weight + i_row, mask=inside, other=0.0).to(tl.float32)
            if WANT_WEIGHT:
                b_d = gradient * (mean * b_weight + first_order * b_response)
                tl.store(p_d_weight + i_row, narrow(b_d, p_d_weight.dtype.element_ty), mask=inside)
            if WANT_RESPONSE:
                b_d = gradient * (first_order * b_weight + second_order * b_response)
                tl.store(p_d_response_weight + i_row, narrow(b_d, p_d_response_weight.dtype.element_ty), mask=inside)


def _options(inputs: int, n: int) -> dict[str, int]:
    block = max(16, min(1024, triton.next_power_of_2(inputs)))
    return {"N_PAD": padded(n), "BLOCK": block, "num_warps": NUM_WARPS}


def forward(
    weight: Tensor, response_weight: Tensor, weight_gate: Tensor, h: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(the penalty of every row (O,), c and q (O, 2), the moments), all float32.

    W, R (O, I), Gw (O, n), h (B, n) and decay (B,) are contiguous and on one device, of any dtypes; n <= gates.MAX_N,
    B >= 1.
    """
    (outputs, inputs), (batch, n) = weight.shape, h.shape
    moments, rows, penalty = (
        weight.new_empty(size, dtype=torch.float32) for size in ((n + n * n + 1,), (outputs, 2), (outputs,))
    )
    options = _options(inputs, n)
    with device_guard(weight):
        decay_moments_kernel[(1,)](
            h, decay, moments, batch, n, N_PAD=options["N_PAD"], BLOCK_B=BLOCK_B, num_warps=NUM_WARPS
        )
        weight_decay_fwd_kernel[(outputs,)](
            weight, response_weight, weight_gate, moments, rows, penalty, inputs, n, **options
        )
    return penalty, rows, moments


def backward(
    d_penalty: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    rows: Tensor,
    moments: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dW, dR, dGw) from the gradient of the sum over rows, a scalar, each where wanted."""
    inputs, n = weight.shape[1], weight_gate.shape[1]
    likes = (weight, response_weight, weight_gate)
    d_weight, d_response, d_gate = (
        like.new_empty(like.shape) if wants else None for like, wants in zip(likes, wanted, strict=True)
    )
    with device_guard(weight):
        weight_decay_bwd_kernel[(len(weight),)](
            d_penalty, weight, response_weight, weight_gate, moments, rows, d_weight, d_response, d_gate, inputs, n,
            WANT_WEIGHT=wanted[0], WANT_RESPONSE=wanted[1], WANT_GATE=wanted[2], **_options(inputs, n),
        )  # fmt: skip
    return d_weight, d_response, d_gate
