"""Gated linear layers as matrix kernels: each pair of products in one pass, under gates from tables.

Rows of x are (outer, batch, inner) positions; row m belongs to example (m // inner) % batch. The tables (batch, O) hold
each example's scale s = h Gwᵀ and shift b + (h Gbᵀ) ⊙ r: y = x Wᵀ + s ⊙ (x Rᵀ) + shift · dx = dy W + (dy ⊙ s) R ·
dW = dyᵀ x · dR = (dy ⊙ s)ᵀ x. Computing s here, by a product with h as short as n, would keep the large products from
running asynchronously. Row indices are 32 bits wide, addresses 64.
"""
# ruff: noqa: E741 (I inputs, O outputs)

import triton
import triton.language as tl

from .launch import narrow
from .matmul import dot, halves, tile_order


@triton.jit
def gated_linear_fwd_kernel(
    p_x,
    p_weight,
    p_response_weight,
    p_scale,
    p_shift,
    p_y,
    p_q,
    M,
    I,
    O,
    batch,
    inner,
    HAS_SHIFT: tl.constexpr,
    STORE_Q: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_tile_m, i_tile_o = tile_order(tl.program_id(0), M, O, BLOCK_M, BLOCK_N, 8)
    i_m = i_tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_o = i_tile_o * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_o = i_m < M, i_o < O
    i_k = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end read the first ones instead of being masked: what they give isn't stored.
    safe_m = tl.where(in_m, i_m, 0).to(tl.int64)
    safe_o = tl.where(in_o, i_o, 0).to(tl.int64)
    p_x_tile = p_x + safe_m[:, None] * I + i_k[None, :]
    i_weight = safe_o[None, :] * I + i_k[:, None]
    p_weight_tile, p_response_tile = p_weight + i_weight, p_response_weight + i_weight

    b_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_q = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, I, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x_tile)
            b_weight = tl.load(p_weight_tile)
            b_response = tl.load(p_response_tile)
        else:
            in_k = i_k < I - k
            b_x = tl.load(p_x_tile, mask=in_k[None, :], other=0.0)
            b_weight = tl.load(p_weight_tile, mask=in_k[:, None], other=0.0)
            b_response = tl.load(p_response_tile, mask=in_k[:, None], other=0.0)
        b_p = dot(b_x, b_weight, b_p, PRECISION)
        b_q = dot(b_x, b_response, b_q, PRECISION)
        p_x_tile += BLOCK_K
        p_weight_tile += BLOCK_K
        p_response_tile += BLOCK_K

    # Gates would be a third tile; in two halves they fit the registers that the products leave.
    b_p0, b_p1 = halves(b_p, BLOCK_M, BLOCK_N)
    b_q0, b_q1 = halves(b_q, BLOCK_M, BLOCK_N)
    i_example = ((i_m // inner) % batch).to(tl.int64)
    for half in tl.static_range(2):
        i_o = i_tile_o * BLOCK_N + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        b_y, b_z = (b_p0, b_q0) if half == 0 else (b_p1, b_q1)
        inside = in_m[:, None] & (i_o < O)[None, :]
        i_y = i_m.to(tl.int64)[:, None] * O + i_o[None, :]
        i_gate = (i_example * O)[:, None] + i_o[None, :]
        if STORE_Q:
            tl.store(p_q + i_y, narrow(b_z, p_q.dtype.element_ty), mask=inside)
        b_y += b_z * tl.load(p_scale + i_gate, mask=inside, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            b_y += tl.load(p_shift + i_gate, mask=inside, other=0.0).to(tl.float32)
        tl.store(p_y + i_y, narrow(b_y, p_y.dtype.element_ty), mask=inside)


@triton.jit
def gated_linear_bwd_dx_kernel(
    p_dy,
    p_weight,
    p_response_weight,
    p_scale,
    p_dx,
    M,
    I,
    O,
    batch,
    inner,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = dy W + (dy ⊙ s) R, one accumulator for both; the sum runs over outputs."""
    i_tile_m, i_tile_i = tile_order(tl.program_id(0), M, I, BLOCK_M, BLOCK_N, 8)
    i_m = i_tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_i = i_tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_i = i_m < M, i_i < I
    safe_m = tl.where(in_m, i_m, 0).to(tl.int64)
    i_k = tl.arange(0, BLOCK_K)
    p_dy_tile = p_dy + safe_m[:, None] * O + i_k[None, :]
    i_weight = i_k.to(tl.int64)[:, None] * I + i_i[None, :]
    p_weight_tile, p_response_tile = p_weight + i_weight, p_response_weight + i_weight
    p_scale_tile = p_scale + ((safe_m // inner) % batch * O)[:, None] + i_k[None, :]

    tl.assume(O > 0)  # a loop that may be empty keeps ptxas from running its products asynchronously
    b_dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, O, BLOCK_K):
        if EVEN_K:
            b_dy = tl.load(p_dy_tile)
            b_s = tl.load(p_scale_tile)
            b_weight = tl.load(p_weight_tile, mask=in_i[None, :], other=0.0)
            b_response = tl.load(p_response_tile, mask=in_i[None, :], other=0.0)
        else:
            in_k = i_k < O - k
            inside = in_k[:, None] & in_i[None, :]
            b_dy = tl.load(p_dy_tile, mask=in_k[None, :], other=0.0)
            b_s = tl.load(p_scale_tile, mask=in_k[None, :], other=0.0)
            b_weight = tl.load(p_weight_tile, mask=inside, other=0.0)
            b_response = tl.load(p_response_tile, mask=inside, other=0.0)
        b_g = narrow(b_dy.to(tl.float32) * b_s.to(tl.float32), p_dy.dtype.element_ty)
        b_dx = dot(b_dy, b_weight, b_dx, PRECISION)
        b_dx = dot(b_g, b_response, b_dx, PRECISION)
        p_dy_tile += BLOCK_K
        p_scale_tile += BLOCK_K
        p_weight_tile += BLOCK_K * tl.cast(I, tl.int64)
        p_response_tile += BLOCK_K * tl.cast(I, tl.int64)

    i_dx = i_m.to(tl.int64)[:, None] * I + i_i[None, :]
    tl.store(p_dx + i_dx, narrow(b_dx, p_dx.dtype.element_ty), mask=in_m[:, None] & in_i[None, :])


@triton.jit
def gated_linear_bwd_dw_kernel(
    p_dy,
    p_x,
    p_scale,
    p_d_weight,
    p_d_response_weight,
    M,
    I,
    O,
    batch,
    inner,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW = dyᵀ x and dR = (dy ⊙ s)ᵀ x; tiles of outputs by inputs, the sum runs over rows.

    The sum is not split among programs. That would pay where O * I gives fewer tiles than there are
    multiprocessors, and there are many rows, such as 256 by 256 weights under 10^5 rows.
    """
    i_tile_o, i_tile_i = tile_order(tl.program_id(0), O, I, BLOCK_M, BLOCK_N, 8)
    i_o = i_tile_o * BLOCK_M + tl.arange(0, BLOCK_M)
    i_i = i_tile_i * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o, in_i = i_o < O, i_i < I
    i_k = tl.arange(0, BLOCK_K)
    p_dy_tile = p_dy + i_k.to(tl.int64)[None, :] * O + i_o[:, None]
    p_x_tile = p_x + i_k.to(tl.int64)[:, None] * I + i_i[None, :]

    tl.assume(M > 0)  # as in dx
    b_d_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_d_response = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, M, BLOCK_K):
        if EVEN_K:
            b_dy = tl.load(p_dy_tile, mask=in_o[:, None], other=0.0)
            b_x = tl.load(p_x_tile, mask=in_i[None, :], other=0.0)
        else:
            in_k = i_k < M - k
            b_dy = tl.load(p_dy_tile, mask=in_o[:, None] & in_k[None, :], other=0.0)
            b_x = tl.load(p_x_tile, mask=in_k[:, None] & in_i[None, :], other=0.0)
        p_scale_tile = p_scale + ((k + i_k) // inner % batch * tl.cast(O, tl.int64))[None, :]
        b_s = tl.load(p_scale_tile + i_o[:, None], mask=in_o[:, None], other=0.0)
        b_g = narrow(b_dy.to(tl.float32) * b_s.to(tl.float32), p_dy.dtype.element_ty)
        b_d_weight = dot(b_dy, b_x, b_d_weight, PRECISION)
        b_d_response = dot(b_g, b_x, b_d_response, PRECISION)
        p_dy_tile += BLOCK_K * tl.cast(O, tl.int64)
        p_x_tile += BLOCK_K * tl.cast(I, tl.int64)

    i_dw = i_o.to(tl.int64)[:, None] * I + i_i[None, :]
    inside = in_o[:, None] & in_i[None, :]
    tl.store(p_d_weight + i_dw, narrow(b_d_weight, p_d_weight.dtype.element_ty), mask=inside)
    tl.store(p_d_response_weight + i_dw, narrow(b_d_response, p_d_response_weight.dtype.element_ty), mask=inside)
