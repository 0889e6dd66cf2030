"""Gated linear layers around library products: what is left once P = x Wᵀ and Q = x Rᵀ are there.

Each kernel is one pass over dy, P or Q, with rows as in gated_linear_matmul. Sums over positions are not taken
before the products with h and the gates: n is small, so on tensor cores those products cost 16 / I of dW, less
than writing a sum per example in float32 and reading it back. Sums across programs go through partial buffers,
added in a fixed order.
"""
# ruff: noqa: E741 (I inputs, O outputs)

from functools import cache

import torch
import triton
import triton.language as tl

from .gates import gate_columns, gate_shift, response_input
from .launch import narrow
from .matmul import dot

# (BLOCK_M, BLOCK_N) tiles of rows by outputs. One forward shape fits every dtype; a second product needs a smaller one.
EPILOGUE_CONFIG = triton.Config({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2)
LOW_RANK_CONFIG = triton.Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8, num_stages=2)
# The highest rank whose response the passes compute themselves, tile by tile, on tensor cores. Higher ranks, and
# products in float32 on ordinary cores, would need more registers than there are.
MAX_RANK = 16
# Partial sums by outputs.
FINISH_CONFIG = triton.Config({"BLOCK_S": 32, "BLOCK_N": 4}, num_warps=4, num_stages=1)


@cache
def backward_config(dtype: torch.dtype, n_pad: int, k_pad: int = 0) -> triton.Config:
    """The tile of both passes over dy. Products in float32 take more registers, and so do longer rows of h or u."""
    rows = 16 if n_pad > 16 else 32 if dtype == torch.float32 else 64
    rows = max(16, rows // 2) if k_pad else rows
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": 64}, num_warps=8, num_stages=1)


@triton.jit
def response(p_u, p_factor, i_m, i_o, in_m, in_o, rank, PRECISION: tl.constexpr, K_PAD: tl.constexpr):
    """A tile of Q = u Aᵀ in float32, of u (M, rank) and A (O, rank)."""
    i_k = tl.arange(0, K_PAD)
    in_k = i_k < rank
    i_u = i_m.to(tl.int64)[:, None] * rank + i_k[None, :]
    i_a = i_o.to(tl.int64)[None, :] * rank + i_k[:, None]
    b_u = tl.load(p_u + i_u, mask=in_m[:, None] & in_k[None, :], other=0.0)
    b_a = tl.load(p_factor + i_a, mask=in_o[None, :] & in_k[:, None], other=0.0)
    return dot(b_u, b_a, tl.zeros((i_m.shape[0], i_o.shape[0]), tl.float32), PRECISION)


@triton.jit
def gated_linear_epilogue_fwd_kernel(
    p_y,
    p_q,
    p_factor,
    p_h,
    p_weight_gate,
    p_bias,
    p_response_bias,
    p_bias_gate,
    M,
    O,
    n,
    rank,
    batch,
    inner,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
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
    if K_PAD:  # p_q is u
        b_y = b_p + b_s * response(p_q, p_factor, i_m, i_o, in_m, in_o, rank, PRECISION, K_PAD)
    else:
        b_y = b_p + b_s * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_y += gate_shift(b_h, p_bias, p_response_bias, p_bias_gate, i_o, in_o, n, PRECISION, N_PAD)
    tl.store(p_y + i_y, narrow(b_y, p_y.dtype.element_ty), mask=inside)


@triton.jit
def response_gates(p_response_bias, p_bias_gate, i_o, in_o, n, N_PAD: tl.constexpr):
    """r ⊙ Gb, transposed as by `gate_columns`: what dy is multiplied by for dh."""
    b_response_bias = tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
    b_bias_gate = gate_columns(p_bias_gate, i_o, in_o, n, N_PAD)
    return narrow(b_bias_gate.to(tl.float32) * b_response_bias[None, :], p_bias_gate.dtype.element_ty)


@triton.jit
def gated_linear_epilogue_bwd_rows_kernel(
    p_dy,
    p_q,
    p_factor,
    p_h,
    p_weight_gate,
    p_response_bias,
    p_bias_gate,
    p_g,
    p_dh_partial,
    M,
    O,
    n,
    rank,
    batch,
    inner,
    tiles_each,
    HAS_BIAS: tl.constexpr,
    STORE_G: tl.constexpr,
    WANT_H: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """g = dy ⊙ s, and per row (dy ⊙ q) Gw + (dy ⊙ r) Gb over `tiles_each` tiles of outputs (splits, M, n)."""
    dtype: tl.constexpr = p_dy.dtype.element_ty
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
        b_dy = tl.load(p_dy + i_y, mask=inside, other=0.0)
        b_wide = b_dy.to(tl.float32)
        b_gate = gate_columns(p_weight_gate, i_o, in_o, n, N_PAD)
        if STORE_G:
            b_g = b_wide * dot(b_h, b_gate, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            tl.store(p_g + i_y, narrow(b_g, dtype), mask=inside)
        if WANT_H:
            if K_PAD:  # p_q is u
                b_q = response(p_q, p_factor, i_m, i_o, in_m, in_o, rank, PRECISION, K_PAD)
                b_ds = narrow(b_wide * b_q, dtype)
            else:
                b_ds = narrow(b_wide * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32), dtype)
            b_dh = dot(b_ds, tl.trans(b_gate), b_dh, PRECISION)
            if HAS_BIAS:
                b_both = response_gates(p_response_bias, p_bias_gate, i_o, in_o, n, N_PAD)
                b_dh = dot(b_dy, tl.trans(b_both), b_dh, PRECISION)
    if WANT_H:
        i_n = tl.arange(0, N_PAD)
        i_dh = (i_split.to(tl.int64) * M + i_m)[:, None] * n + i_n[None, :]
        tl.store(p_dh_partial + i_dh, b_dh, mask=in_m[:, None] & (i_n < n)[None, :])


@triton.jit
def gated_linear_epilogue_bwd_gates_kernel(
    p_dy,
    p_q,
    p_factor,
    p_h,
    p_weight_gate,
    p_response_bias,
    p_bias_gate,
    p_g,
    p_s_partial,
    p_c_partial,
    p_bias_partial,
    p_dh_partial,
    M,
    O,
    n,
    rank,
    batch,
    inner,
    tiles_each,
    HAS_BIAS: tl.constexpr,
    STORE_G: tl.constexpr,
    WANT_S: tl.constexpr,
    WANT_C: tl.constexpr,
    WANT_H: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Over `tiles_each` tiles of rows (dy ⊙ q)ᵀ h, dyᵀ h (splits, O, n) and Σ dy (splits, O); g and dh as `bwd_rows`.

    Each tile of outputs leaves a partial dh, (tiles, M, n): fewer bytes than a second pass over dy and q would read.
    """
    dtype: tl.constexpr = p_dy.dtype.element_ty
    i_split = tl.program_id(1)
    i_o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o = i_o < O
    i_n = tl.arange(0, N_PAD)
    b_gate = gate_columns(p_weight_gate, i_o, in_o, n, N_PAD)
    if WANT_H and HAS_BIAS:
        b_both = response_gates(p_response_bias, p_bias_gate, i_o, in_o, n, N_PAD)
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
            tl.store(p_g + i_y, narrow(b_g, dtype), mask=inside)
        if WANT_S or WANT_H:
            if K_PAD:  # p_q is u
                b_q = response(p_q, p_factor, i_m, i_o, in_m, in_o, rank, PRECISION, K_PAD)
                b_ds = narrow(b_wide * b_q, dtype)
            else:
                b_ds = narrow(b_wide * tl.load(p_q + i_y, mask=inside, other=0.0).to(tl.float32), dtype)
            if WANT_S:
                b_s = dot(tl.trans(b_ds), b_h, b_s, PRECISION)
            if WANT_H:
                b_dh = dot(b_ds, tl.trans(b_gate), tl.zeros((BLOCK_M, N_PAD), tl.float32), PRECISION)
                if HAS_BIAS:
                    b_dh = dot(b_dy, tl.trans(b_both), b_dh, PRECISION)
                i_dh = (tl.program_id(0).to(tl.int64) * M + i_m)[:, None] * n + i_n[None, :]
                tl.store(p_dh_partial + i_dh, b_dh, mask=in_m[:, None] & (i_n < n)[None, :])
        if WANT_C:
            b_c = dot(tl.trans(b_dy), b_h, b_c, PRECISION)
            b_bias += tl.sum(b_wide, axis=0)
    i_row = i_split.to(tl.int64) * O + i_o
    i_partial = i_row[:, None] * n + i_n[None, :]
    inside_gate = in_o[:, None] & (i_n < n)[None, :]
    if WANT_S:
        tl.store(p_s_partial + i_partial, b_s, mask=inside_gate)
    if WANT_C:
        tl.store(p_c_partial + i_partial, b_c, mask=inside_gate)
        tl.store(p_bias_partial + i_row, b_bias, mask=in_o)


@triton.jit
def sum_of_partials(p_partial, i_column, inside, columns, splits, BLOCK_S: tl.constexpr):
    """Columns of (splits, columns) added in a fixed order, BLOCK_S rows at a time."""
    b_sum = tl.zeros(i_column.shape, tl.float32)
    for first in range(0, splits, BLOCK_S):
        i_split = first + tl.arange(0, BLOCK_S)
        p_tile = p_partial + (i_split.to(tl.int64) * columns)[:, None] + i_column[None, :]
        b_sum += tl.sum(tl.load(p_tile, mask=(i_split < splits)[:, None] & inside[None, :], other=0.0), axis=0)
    return b_sum


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
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the partial sums in order; dGb = r ⊙ (dyᵀ h) and dr = Σ_k (dyᵀ h) ⊙ Gb."""
    i = tl.arange(0, BLOCK_N * N_PAD)
    i_o, i_n = tl.program_id(0) * BLOCK_N + i // N_PAD, i % N_PAD
    i_gate = i_o.to(tl.int64) * n + i_n
    inside = (i_o < O) & (i_n < n)
    columns = tl.cast(O, tl.int64) * n
    if WANT_S:
        b_s = sum_of_partials(p_s_partial, i_gate, inside, columns, splits, BLOCK_S)
        tl.store(p_d_weight_gate + i_gate, narrow(b_s, p_d_weight_gate.dtype.element_ty), mask=inside)
    if WANT_C:
        b_c = sum_of_partials(p_c_partial, i_gate, inside, columns, splits, BLOCK_S)
        b_d_gate = b_c * tl.load(p_response_bias + i_o, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_d_bias_gate + i_gate, narrow(b_d_gate, p_d_bias_gate.dtype.element_ty), mask=inside)
        b_gate = tl.load(p_bias_gate + i_gate, mask=inside, other=0.0).to(tl.float32)
        b_d_response_bias = tl.sum(tl.reshape(b_c * b_gate, (BLOCK_N, N_PAD)), axis=1)
        i_bias = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_o = i_bias < O
        b_bias = sum_of_partials(p_bias_partial, i_bias, in_o, O, splits, BLOCK_S)
        tl.store(p_d_bias + i_bias, narrow(b_bias, p_d_bias.dtype.element_ty), mask=in_o)
        tl.store(p_d_response_bias + i_bias, narrow(b_d_response_bias, p_d_response_bias.dtype.element_ty), mask=in_o)
