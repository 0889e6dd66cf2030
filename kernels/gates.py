"""Gates of a layer: what kernels need to compute them, and all of them in one pass as tables of examples by outputs.

A table is worth its bytes where several tiles or several rows use the same gates, or where a kernel has no registers
left for a product with h.
"""
# ruff: noqa: E741 (O outputs)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, narrow
from .matmul import dot

# Hyperparameters of one layer that every shipped configuration has registers for; beyond it they spill.
MAX_N = 32
TABLES_CONFIG = triton.Config({"BLOCK_B": 32, "BLOCK_O": 64}, num_warps=8, num_stages=1)


@triton.jit
def response_input(p_h, i_m, in_m, batch, inner, n, N_PAD: tl.constexpr):
    """h of the example that each row belongs to: (rows, N_PAD)."""
    i_n = tl.arange(0, N_PAD)
    i_example = ((i_m // inner) % batch).to(tl.int64)
    return tl.load(p_h + i_example[:, None] * n + i_n[None, :], mask=in_m[:, None] & (i_n < n)[None, :], other=0.0)


@triton.jit
def gate_columns(p_gate, i_o, in_o, n, N_PAD: tl.constexpr):
    """A gate matrix (O, n), transposed: (N_PAD, outputs), ready to be multiplied by rows of h."""
    i_n = tl.arange(0, N_PAD)
    p_gates = p_gate + i_o.to(tl.int64)[None, :] * n + i_n[:, None]
    return tl.load(p_gates, mask=(i_n < n)[:, None] & in_o[None, :], other=0.0)


@triton.jit
def gate_shift(b_h, p_bias, p_response_bias, p_bias_gate, i_o, in_o, n, PRECISION: tl.constexpr, N_PAD: tl.constexpr):
    """b + (h Gbᵀ) ⊙ r of rows by outputs, in float32."""
    b_bias = tl.load(p_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
    b_response_bias = tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
    zero = tl.zeros((b_h.shape[0], i_o.shape[0]), tl.float32)
    b_gate = dot(b_h, gate_columns(p_bias_gate, i_o, in_o, n, N_PAD), zero, PRECISION)
    return b_bias[None, :] + b_gate * b_response_bias[None, :]


@triton.jit
def gate_tables_kernel(
    p_h,
    p_weight_gate,
    p_bias,
    p_response_bias,
    p_bias_gate,
    p_scale,
    p_shift,
    batch,
    O,
    n,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tiles_o = tl.cdiv(O, BLOCK_O)
    i_b = (tl.program_id(0) // tiles_o) * BLOCK_B + tl.arange(0, BLOCK_B)
    i_o = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_b, in_o = i_b < batch, i_o < O
    inside = in_b[:, None] & in_o[None, :]
    i_table = i_b.to(tl.int64)[:, None] * O + i_o[None, :]
    b_h = response_input(p_h, i_b, in_b, batch, 1, n, N_PAD)
    zero = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    b_scale = dot(b_h, gate_columns(p_weight_gate, i_o, in_o, n, N_PAD), zero, PRECISION)
    tl.store(p_scale + i_table, narrow(b_scale, p_scale.dtype.element_ty), mask=inside)
    if HAS_SHIFT:
        b_shift = gate_shift(b_h, p_bias, p_response_bias, p_bias_gate, i_o, in_o, n, PRECISION, N_PAD)
        tl.store(p_shift + i_table, narrow(b_shift, p_shift.dtype.element_ty), mask=inside)


def gate_tables(
    h: Tensor,
    weight_gate: Tensor,
    bias: Tensor | None,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    precision: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Every example's scale h Gwᵀ and shift b + (h Gbᵀ) ⊙ r, (B, O), of `dtype`; no shift without bias.

    All tensors are contiguous, of one dtype and on the current device. precision: how float32 is multiplied, as in
    tl.dot. Arithmetic is in float32.
    """
    (batch, n), outputs = h.shape, len(weight_gate)
    scale = h.new_empty(batch, outputs, dtype=dtype)
    shift = None if bias is None else torch.empty_like(scale)
    tile = TABLES_CONFIG.kwargs
    gate_tables_kernel[(ceil_div(batch, tile["BLOCK_B"]) * ceil_div(outputs, tile["BLOCK_O"]),)](
        h, weight_gate, bias, response_bias, bias_gate, scale, shift, batch, outputs, n,
        HAS_SHIFT=shift is not None, PRECISION=precision, N_PAD=padded(n),
        num_warps=TABLES_CONFIG.num_warps, num_stages=TABLES_CONFIG.num_stages, **tile,
    )  # fmt: skip
    return scale, shift


def padded(n: int) -> int:
    """The length of a row of h in a kernel: products are at least 16 long."""
    return max(16, triton.next_power_of_2(n))
