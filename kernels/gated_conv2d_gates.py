"""Gates of a convolution on a GPU: their tables in one launch, and all that follows from the tables' gradients in two.

scale = h Gwᵀ and shift = b + (h Gbᵀ) ⊙ r, (B, O). From d_scale and d_shift, which may be in parts to be added up:
dGw = d_scaleᵀ h, db = Σ d_shift, dGb = r ⊙ (d_shiftᵀ h), dr = Σ_k (d_shiftᵀ h) ⊙ Gb, and
dh = d_scale Gw + (d_shift ⊙ r) Gb. Arithmetic is in float32 proper, and sums are in a fixed order.
"""
# ruff: noqa: E741 (O outputs)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import gate_tables, padded
from .launch import ceil_div, device_guard, narrow
from .matmul import dot

# By N_PAD, the length of a row of gates: other tiles and numbers of warps spill for some type or alignment of sizes.
GATES_CONFIGS = {
    16: triton.Config({"BLOCK_B": 32, "BLOCK_O": 16}, num_warps=8),
    32: triton.Config({"BLOCK_B": 32, "BLOCK_O": 16}, num_warps=4),
}
RESPONSE_CONFIGS = {
    16: triton.Config({"BLOCK_B": 16, "BLOCK_O": 32}, num_warps=8),
    32: triton.Config({"BLOCK_B": 16, "BLOCK_O": 64}, num_warps=8),
}


@triton.jit
def load_rows(p_rows, i_row, in_row, n, N_PAD: tl.constexpr):
    """Rows of n numbers, of examples or of outputs: (rows, N_PAD) in float32."""
    i_n = tl.arange(0, N_PAD)
    inside = in_row[:, None] & (i_n < n)[None, :]
    return tl.load(p_rows + i_row.to(tl.int64)[:, None] * n + i_n[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_sum(p_parts, i_b, in_b, i_o, in_o, parts, batch, O, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr):
    """A tile of (parts, B, O), added up over the parts."""
    inside = in_b[:, None] & in_o[None, :]
    b_sum = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for part in range(0, parts):
        i_row = tl.cast(part, tl.int64) * batch + i_b
        b_sum += tl.load(p_parts + i_row[:, None] * O + i_o[None, :], mask=inside, other=0.0)
    return b_sum


@triton.jit
def gated_conv2d_bwd_gates_kernel(
    p_d_scale,
    p_d_shift,
    p_h,
    p_response_bias,
    p_bias_gate,
    p_d_weight_gate,
    p_d_bias,
    p_d_response_bias,
    p_d_bias_gate,
    parts,
    batch,
    O,
    n,
    WANT_SCALE: tl.constexpr,
    WANT_SHIFT: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """For a tile of outputs, over all examples."""
    i_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = i_o < O
    b_s = tl.zeros((BLOCK_O, N_PAD), tl.float32)
    b_c = tl.zeros((BLOCK_O, N_PAD), tl.float32)
    b_bias = tl.zeros((BLOCK_O,), tl.float32)
    for first in range(0, batch, BLOCK_B):
        i_b = first + tl.arange(0, BLOCK_B)
        in_b = i_b < batch
        b_h = load_rows(p_h, i_b, in_b, n, N_PAD)
        if WANT_SCALE:
            b_d_scale = load_sum(p_d_scale, i_b, in_b, i_o, in_o, parts, batch, O, BLOCK_B, BLOCK_O)
            b_s = dot(tl.trans(b_d_scale), b_h, b_s, "ieee")
        if WANT_SHIFT:
            b_d_shift = load_sum(p_d_shift, i_b, in_b, i_o, in_o, parts, batch, O, BLOCK_B, BLOCK_O)
            b_c = dot(tl.trans(b_d_shift), b_h, b_c, "ieee")
            b_bias += tl.sum(b_d_shift, axis=0)
    i_n = tl.arange(0, N_PAD)
    i_gate = i_o.to(tl.int64)[:, None] * n + i_n[None, :]
    inside = in_o[:, None] & (i_n < n)[None, :]
    if WANT_SCALE:
        tl.store(p_d_weight_gate + i_gate, narrow(b_s, p_d_weight_gate.dtype.element_ty), mask=inside)
    if WANT_SHIFT:
        b_response_bias = tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)
        b_d_response_bias = tl.sum(b_c * load_rows(p_bias_gate, i_o, in_o, n, N_PAD), axis=1)
        b_d_gate = b_c * b_response_bias[:, None]
        tl.store(p_d_bias_gate + i_gate, narrow(b_d_gate, p_d_bias_gate.dtype.element_ty), mask=inside)
        tl.store(p_d_bias + i_o, narrow(b_bias, p_d_bias.dtype.element_ty), mask=in_o)
        tl.store(p_d_response_bias + i_o, narrow(b_d_response_bias, p_d_response_bias.dtype.element_ty), mask=in_o)


@triton.jit
def gated_conv2d_bwd_response_kernel(
    p_d_scale,
    p_d_shift,
    p_weight_gate,
    p_response_bias,
    p_bias_gate,
    p_dh,
    parts,
    batch,
    O,
    n,
    HAS_SHIFT: tl.constexpr,
    N_PAD: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dh for a tile of examples, over all outputs."""
    i_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = i_b < batch
    b_dh = tl.zeros((BLOCK_B, N_PAD), tl.float32)
    for first in range(0, O, BLOCK_O):
        i_o = first + tl.arange(0, BLOCK_O)
        in_o = i_o < O
        b_d_scale = load_sum(p_d_scale, i_b, in_b, i_o, in_o, parts, batch, O, BLOCK_B, BLOCK_O)
        b_dh = dot(b_d_scale, load_rows(p_weight_gate, i_o, in_o, n, N_PAD), b_dh, "ieee")
        if HAS_SHIFT:
            b_d_shift = load_sum(p_d_shift, i_b, in_b, i_o, in_o, parts, batch, O, BLOCK_B, BLOCK_O)
            b_d_shift *= tl.load(p_response_bias + i_o, mask=in_o, other=0.0).to(tl.float32)[None, :]
            b_dh = dot(b_d_shift, load_rows(p_bias_gate, i_o, in_o, n, N_PAD), b_dh, "ieee")
    i_n = tl.arange(0, N_PAD)
    inside = in_b[:, None] & (i_n < n)[None, :]
    tl.store(p_dh + i_b.to(tl.int64)[:, None] * n + i_n[None, :], narrow(b_dh, p_dh.dtype.element_ty), mask=inside)


def _options(config: triton.Config, n: int) -> dict[str, int]:
    return {"N_PAD": padded(n), "num_warps": config.num_warps, **config.kwargs}


def gates(
    bias: Tensor | None, response_bias: Tensor | None, weight_gate: Tensor, bias_gate: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Every example's scale h Gwᵀ and shift b + (h Gbᵀ) ⊙ r, (B, O) in float32; no shift without bias.

    All are contiguous; h (B, n) with n <= MAX_N.
    """
    with device_guard(h):
        return gate_tables(h, weight_gate, bias, response_bias, bias_gate, "ieee", torch.float32)


def gates_backward(
    d_scale: Tensor | None,
    d_shift: Tensor | None,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    wanted: Any,
) -> tuple[Tensor | None, ...]:
    """(db, dr, dGw, dGb, dh), those at least that `wanted` says by the names bias, response_bias, weight_gate, ...

    d_scale, d_shift: (parts, B, O) float32; None where nothing that follows from them is wanted.
    """
    wants_gates = wanted.bias or wanted.response_bias or wanted.weight_gate or wanted.bias_gate
    some = d_scale if d_scale is not None else d_shift
    if some is None:
        return (None,) * 5
    parts, batch, outputs = some.shape
    n = h.shape[1]
    d_bias = d_response_bias = d_weight_gate = d_bias_gate = dh = None
    with device_guard(h):
        if wants_gates:
            d_weight_gate = torch.empty_like(weight_gate) if d_scale is not None else None
            if d_shift is not None:
                d_bias, d_response_bias = h.new_empty(outputs), h.new_empty(outputs)
                d_bias_gate = torch.empty_like(weight_gate)
            config = GATES_CONFIGS[padded(n)]
            gated_conv2d_bwd_gates_kernel[(ceil_div(outputs, config.kwargs["BLOCK_O"]),)](
                d_scale, d_shift, h, response_bias, bias_gate, d_weight_gate, d_bias, d_response_bias, d_bias_gate,
                parts, batch, outputs, n,
                WANT_SCALE=d_scale is not None, WANT_SHIFT=d_shift is not None, **_options(config, n),
            )  # fmt: skip
        if wanted.h:
            dh = torch.empty_like(h)
            config = RESPONSE_CONFIGS[padded(n)]
            gated_conv2d_bwd_response_kernel[(ceil_div(batch, config.kwargs["BLOCK_B"]),)](
                d_scale, d_shift, weight_gate, response_bias, bias_gate, dh, parts, batch, outputs, n,
                HAS_SHIFT=d_shift is not None, **_options(config, n),
            )  # fmt: skip
    return d_bias, d_response_bias, d_weight_gate, d_bias_gate, dh
