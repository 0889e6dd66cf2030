"""Gated linear layers around library products: what is left once P = x Wᵀ and Q = x Rᵀ are there.

Each kernel is one pass over dy, P or Q, with rows as in gated_linear_matmul. Sums over positions are not taken
before the products with h and the gates: n is small, so on tensor cores those products cost 16 / I of dW, less
than writing a sum per example in float32 and reading it back. Sums across programs go through partial buffers,
added in a fixed order.
"""
# ruff: noqa: E741 (I inputs, O outputs)

import triton
import triton.language as tl

from .gated_linear_matmul import gate_columns, response_input
from .launch import narrow
from .matmul import dot

# (BLOCK_M, BLOCK_N) tiles of rows by outputs, one shape that fits every dtype.
EPILOGUE_CONFIG = triton.Config({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2)
BWD_ROWS_CONFIG = triton.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=2)
BWD_GATES_CONFIG = triton.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=1)
FINISH_CONFIG = triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=2)


@triton.jit
def gated_linear_epilogue_fwd_kernel(
    p_y,
    p_q,
    p_h,
    p_weight_gate,
    p_bias,
    p_response_bias,
    p_bias_gate,
    M,
    O,
    n,
    batch,
    inner,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = P + s ⊙ Q + b + (h Gbᵀ) ⊙ r, in place: y holds P on entry."""
    tiles_o = tl.cdiv(O, BLOCK_N)
    i_m = (tl.program_id(0) // tiles_o) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_o = (tl.program_id(0) % tiles_o) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = i_m < M, i_o < O
    inside = in_m[:, None] & in_o[None, :]
    i_y = i_m.to(tl.int64)[:, None] * O + i_o[None, :]
    b_h = response_input(p_h, i_m, in_m, batch, inner, n, N_PAD)
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_s = dot(b_h, gate_columns(p_weight_gate, i_o, in_o, n, N_PAD), zero, PRECISION)
    b_p = tl.load(p_y + i_y, mask=inside, other=0.0).to(tl.float32)
    b_y = b_p + b_s * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
        b_response_bias = tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
        b_bias_gate = dot(b_h, gate_columns(p_bias_gate, i_o, in_o, n, N_PAD), zero, PRECISION)
        b_y += b_bias[None, :] + b_bias_gate * b_response_bias[None, :]
    tl.store(p_y + i_y, narrow(b_y, p_y.dtype.element_ty), mask=inside)


@triton.jit
def gated_linear_epilogue_bwd_rows_kernel(
    p_dy,
    p_q,
    p_h,
    p_weight_gate,
    p_response_bias,
    p_bias_gate,
    p_g,
    p_dh_partial,
    M,
    O,
    n,
    batch,
    inner,
    tiles_each,
    HAS_BIAS: tl.constexpr,
    STORE_G: tl.constexpr,
    WANT_H: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g = dy ⊙ s, and per row (dy ⊙ q) Gw + (dy ⊙ r) Gb over `tiles_each` tiles of outputs (splits, M, n)."""
    i_split = tl.program_id(1)
    i_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = i_m < M
    b_h = response_input(p_h, i_m, in_m, batch, inner, n, N_PAD)
    b_dh = tl.zeros((BLOCK_M, N_PAD), tl.float32)
    for tile in range(i_split * tiles_each, (i_split + 1) * tiles_each):
        i_o = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_o = i_o < O
        inside = in_m[:, None] & in_o[None, :]
        i_y = i_m.to(tl.int64)[:, None] * O + i_o[None, :]
        b_dy = tl.load(p_dy + i_y, mask=inside, other=0.0).to(tl.float32)
        b_gate = gate_columns(p_weight_gate, i_o, in_o, n, N_PAD)
        if STORE_G:
            b_g = b_dy * dot(b_h, b_gate, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            tl.store(p_g + i_y, narrow(b_g, p_g.dtype.element_ty), mask=inside)
        if WANT_H:
            b_ds = b_dy * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32)
            b_dh = dot(narrow(b_ds, p_dy.dtype.element_ty), tl.trans(b_gate), b_dh, PRECISION)
            if HAS_BIAS:
                b_dc = b_dy * tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)[None, :]
                b_bias_gate = gate_columns(p_bias_gate, i_o, in_o, n, N_PAD)
                b_dh = dot(narrow(b_dc, p_dy.dtype.element_ty), tl.trans(b_bias_gate), b_dh, PRECISION)
    if WANT_H:
        i_n = tl.arange(0, N_PAD)
        i_dh = (i_split.to(tl.int64) * M + i_m)[:, None] * n + i_n[None, :]
        tl.store(p_dh_partial + i_dh, b_dh, mask=in_m[:, None] & (i_n < n)[None, :])


@triton.jit
def gated_linear_epilogue_bwd_gates_kernel(
    p_dy,
    p_q,
    p_h,
    p_weight_gate,
    p_g,
    p_s_partial,
    p_c_partial,
    p_bias_partial,
    M,
    O,
    n,
    batch,
    inner,
    tiles_each,
    STORE_G: tl.constexpr,
    WANT_S: tl.constexpr,
    WANT_C: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g = dy ⊙ s, and over `tiles_each` tiles of rows (dy ⊙ q)ᵀ h, dyᵀ h (splits, O, n) and Σ dy (splits, O)."""
    i_split = tl.program_id(1)
    i_o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o = i_o < O
    b_gate = gate_columns(p_weight_gate, i_o, in_o, n, N_PAD)
    b_s = tl.zeros((BLOCK_N, N_PAD), tl.float32)
    b_c = tl.zeros((BLOCK_N, N_PAD), tl.float32)
    b_bias = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(i_split * tiles_each, (i_split + 1) * tiles_each):
        i_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = i_m < M
        inside = in_m[:, None] & in_o[None, :]
        i_y = i_m.to(tl.int64)[:, None] * O + i_o[None, :]
        b_h = response_input(p_h, i_m, in_m, batch, inner, n, N_PAD)
        b_dy = tl.load(p_dy + i_y, mask=inside, other=0.0)
        b_wide = b_dy.to(tl.float32)
        if STORE_G:
            b_g = b_wide * dot(b_h, b_gate, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            tl.store(p_g + i_y, narrow(b_g, p_g.dtype.element_ty), mask=inside)
        if WANT_S:
            b_ds = b_wide * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32)
            b_s = dot(tl.trans(narrow(b_ds, p_dy.dtype.element_ty)), b_h, b_s, PRECISION)
        if WANT_C:
            b_c = dot(tl.trans(b_dy), b_h, b_c, PRECISION)
            b_bias += tl.sum(b_wide, axis=0)
    i_n = tl.arange(0, N_PAD)
    i_row = i_split.to(tl.int64) * O + i_o
    i_partial = i_row[:, None] * n + i_n[None, :]
    inside_gate = in_o[:, None] & (i_n < n)[None, :]
    if WANT_S:
        tl.store(p_s_partial + i_partial, b_s, mask=inside_gate)
    if WANT_C:
        tl.store(p_c_partial + i_partial, b_c, mask=inside_gate)
        tl.store(p_bias_partial + i_row, b_bias, mask=in_o)


@triton.jit
def gated_linear_gates_finish_kernel(
    p_s_partial,
    p_c_partial,
    p_bias_partial,
    p_response_bias,
    p_bias_gate,
    p_d_weight_gate,
    p_d_bias,
    p_d_response_bias,
    p_d_bias_gate,
    O,
    n,
    splits,
    WANT_S: tl.constexpr,
    WANT_C: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums in order; dGb = r ⊙ (dyᵀ h) and dr = Σ_k (dyᵀ h) ⊙ Gb."""
    i_o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o = i_o < O
    i_n = tl.arange(0, N_PAD)
    i_gate = i_o.to(tl.int64)[:, None] * n + i_n[None, :]
    inside = in_o[:, None] & (i_n < n)[None, :]
    b_s = tl.zeros((BLOCK_N, N_PAD), tl.float32)
    b_c = tl.zeros((BLOCK_N, N_PAD), tl.float32)
    b_bias = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(0, splits):
        i_first = tl.cast(split, tl.int64) * O
        if WANT_S:
            b_s += tl.load(p_s_partial + i_first * n + i_gate, mask=inside, other=0.0)
        if WANT_C:
            b_c += tl.load(p_c_partial + i_first * n + i_gate, mask=inside, other=0.0)
            b_bias += tl.load(p_bias_partial + i_first + i_o, mask=in_o, other=0.0)
    if WANT_S:
        tl.store(p_d_weight_gate + i_gate, narrow(b_s, p_d_weight_gate.dtype.element_ty), mask=inside)
    if WANT_C:
        b_response_bias = tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
        b_gate = tl.load(p_bias_gate + i_gate, mask=inside, other=0.0).to(tl.float32)
        b_d_gate = b_c * b_response_bias[:, None]
        b_d_response_bias = tl.sum(b_c * b_gate, axis=1)
        tl.store(p_d_bias_gate + i_gate, narrow(b_d_gate, p_d_bias_gate.dtype.element_ty), mask=inside)
        tl.store(p_d_bias + i_o, narrow(b_bias, p_d_bias.dtype.element_ty), mask=in_o)
        tl.store(p_d_response_bias + i_o, narrow(b_d_response_bias, p_d_response_bias.dtype.element_ty), mask=in_o)
