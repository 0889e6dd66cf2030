"""Perturbation of hyperparameters: each example's constrained value and response, and their gradients.

For example b and hyperparameter k, with eps standard normal and sigma = softplus(clamp(rho, rho_min, rho_max)):
lam = location + sigma * eps; value = its image within bounds; response = value or lam - center.
A row of the table: kind (0 no bound, 1 lower, 2 upper, 3 both), low, high, integer, per_example, responds_with_value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, device_guard, words_in_range
from .random import draw_words, normals_in_order

PROGRAM_ELEMENTS = 512
NUM_WARPS = 4


@triton.jit
def exp_minus(x):
    """exp(-x) for x >= 0; 0 where the result would be subnormal (x > 87.3)."""
    bounded = tl.minimum(x, 87.33654)
    k = tl.floor(bounded * -1.44269504 + 0.5)
    r = (-bounded - k * 0.693359375) - k * -2.12194440e-4
    p = r * 0.001381461275741458 + 0.008368710055947304
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    p = (p * r) * r + r + 1.0
    power = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    b_exp = tl.where(x > 87.33654, 0.0, p * power)
    return tl.where(x != x, x, b_exp)  # the minimum above has lost a NaN


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1], as 2 atanh(s) with s = t / (2 + t)."""
    s = t / (2.0 + t)
    s2 = s * s
    p = s2 * 0.12150467187166214 + 0.10713829100131989
    p = p * s2 + 0.14308442175388336
    p = p * s2 + 0.19999438524246216
    p = p * s2 + 0.3333333730697632
    return 2.0 * (s + s * (s2 * p))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(exp_minus(tl.abs(x)))


@triton.jit
def sigmoid(x):
    t = exp_minus(tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)


@triton.jit
def constrained(lam, kind, low, high, integer):
    """Softplus away from one bound, sigmoid between two, floored for integers."""
    t = exp_minus(tl.abs(lam))
    log_term = log1p_unit(t)
    between = low + (high - low) * (tl.where(lam < 0, t, 1.0) / (1.0 + t))
    b_value = tl.where(kind == 1, low + (tl.maximum(lam, 0.0) + log_term), lam)
    b_value = tl.where(kind == 2, high - (tl.maximum(-lam, 0.0) + log_term), b_value)
    b_value = tl.where(kind == 3, between, b_value)
    return tl.where(integer != 0, tl.floor(b_value), b_value)


@triton.jit
def constrained_slope(lam, kind, low, high, integer):
    """d constrained / d lam; 0 for integers."""
    t = exp_minus(tl.abs(lam))
    rising = tl.where(lam < 0, t, 1.0) / (1.0 + t)
    falling = tl.where(lam < 0, 1.0, t) / (1.0 + t)
    b_slope = tl.where(kind == 1, rising, 1.0)
    b_slope = tl.where(kind == 2, falling, b_slope)
    b_slope = tl.where(kind == 3, (high - low) * rising * falling, b_slope)
    return tl.where(integer != 0, 0.0, b_slope)


@triton.jit
def load_columns(p_table, i_k, in_k):
    """kind, low, high, integer, per_example, responds_with_value, each (1, N_PAD)."""
    kind = tl.load(p_table + 6 * i_k, mask=in_k, other=0.0)[None, :]
    low = tl.load(p_table + 6 * i_k + 1, mask=in_k, other=0.0)[None, :]
    high = tl.load(p_table + 6 * i_k + 2, mask=in_k, other=0.0)[None, :]
    integer = tl.load(p_table + 6 * i_k + 3, mask=in_k, other=0.0)[None, :]
    per_example = tl.load(p_table + 6 * i_k + 4, mask=in_k, other=0.0)[None, :]
    with_value = tl.load(p_table + 6 * i_k + 5, mask=in_k, other=0.0)[None, :]
    return kind, low, high, integer, per_example, with_value


@triton.jit(do_not_specialize=["first_example", "seed", "rho_min", "rho_max"])
def perturb_fwd_kernel(
    p_location,
    p_raw_scale,
    p_center,
    p_table,
    p_step,
    p_values,
    p_response,
    p_noise,
    n,
    batch,
    first_example,
    seed,
    rho_min,
    rho_max,
    SAVE_NOISE: tl.constexpr,
    N_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_k = tl.arange(0, N_PAD)
    in_k = i_k < n
    i_b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (i_b < batch)[:, None] & in_k[None, :]
    b_location = tl.load(p_location + i_k, mask=in_k, other=0.0)[None, :]
    b_rho = tl.load(p_raw_scale + i_k, mask=in_k, other=0.0)
    b_center = tl.load(p_center + i_k, mask=in_k, other=0.0)[None, :]
    kind, low, high, integer, per_example, with_value = load_columns(p_table, i_k, in_k)

    i_quad = tl.arange(0, N_PAD // 4)[None, :]
    example = (first_example + i_b)[:, None]
    w0, w1, w2, w3 = draw_words(i_quad, example, p_step, seed, tl.full((1, 1), 0, tl.int32))
    b_own = normals_in_order(w0, w1, w2, w3)
    # What is drawn once per batch is drawn for example 0 of the whole batch, whichever process holds it.
    w0, w1, w2, w3 = draw_words(i_quad, tl.zeros_like(i_quad), p_step, seed, tl.full((1, 1), 0, tl.int32))
    b_eps = tl.where(per_example != 0, b_own, normals_in_order(w0, w1, w2, w3))

    b_lam = b_location + softplus(tl.minimum(tl.maximum(b_rho, rho_min), rho_max))[None, :] * b_eps
    b_value = constrained(b_lam, kind, low, high, integer)
    i_column_major = i_k[None, :].to(tl.int64) * batch + i_b[:, None]
    i_row_major = i_b[:, None] * n + i_k[None, :]
    tl.store(p_values + i_column_major, b_value, mask=inside)
    tl.store(p_response + i_row_major, tl.where(with_value != 0, b_value, b_lam - b_center), mask=inside)
    if SAVE_NOISE:
        tl.store(p_noise + i_column_major, b_eps, mask=inside)


@triton.jit(do_not_specialize=["rho_min", "rho_max"])
def perturb_bwd_kernel(
    p_location,
    p_raw_scale,
    p_table,
    p_noise,
    p_d_values,
    p_d_response,
    p_partial,
    n,
    batch,
    rho_min,
    rho_max,
    HAS_D_VALUES: tl.constexpr,
    HAS_D_RESPONSE: tl.constexpr,
    N_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    i_k = tl.arange(0, N_PAD)
    in_k = i_k < n
    i_b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (i_b < batch)[:, None] & in_k[None, :]
    b_location = tl.load(p_location + i_k, mask=in_k, other=0.0)[None, :]
    b_rho = tl.load(p_raw_scale + i_k, mask=in_k, other=0.0)
    kind, low, high, integer, _, with_value = load_columns(p_table, i_k, in_k)

    i_column_major = i_k[None, :].to(tl.int64) * batch + i_b[:, None]
    b_eps = tl.load(p_noise + i_column_major, mask=inside, other=0.0)
    b_lam = b_location + softplus(tl.minimum(tl.maximum(b_rho, rho_min), rho_max))[None, :] * b_eps
    b_slope = constrained_slope(b_lam, kind, low, high, integer)
    b_d_lam = tl.zeros((ROWS, N_PAD), tl.float32)
    if HAS_D_VALUES:
        b_d_lam += tl.load(p_d_values + i_column_major, mask=inside, other=0.0) * b_slope
    if HAS_D_RESPONSE:
        b_d_response = tl.load(p_d_response + i_b[:, None] * n + i_k[None, :], mask=inside, other=0.0)
        b_d_lam += b_d_response * tl.where(with_value != 0, b_slope, 1.0)
    passes = (b_rho >= rho_min) & (b_rho <= rho_max)
    b_d_rho = tl.where(passes, tl.sum(b_d_lam * b_eps, axis=0) * sigmoid(b_rho), 0.0)
    p_partial += tl.program_id(0).to(tl.int64) * 2 * n
    tl.store(p_partial + i_k, tl.sum(b_d_lam, axis=0), mask=in_k)
    tl.store(p_partial + n + i_k, b_d_rho, mask=in_k)


def _tile(n: int) -> tuple[int, int]:
    n_pad = max(4, triton.next_power_of_2(n))
    return n_pad, max(1, PROGRAM_ELEMENTS // n_pad)


def perturb_forward(
    location: Tensor,
    raw_scale: Tensor,
    center: Tensor,
    table: Tensor,
    step: Tensor,
    values: Tensor,
    response: Tensor,
    noise: Tensor | None,
    seed: int,
    first_example: int,
    rho_min: float,
    rho_max: float,
) -> None:
    """Fills values (n, B), response (B, n) and noise (n, B); location, raw_scale, center are (n,), table (n, 6)."""
    n, batch_size = values.shape
    if not values.numel():
        return
    n_pad, rows = _tile(n)
    (first_example,) = words_in_range(first_example)
    with device_guard(location):
        perturb_fwd_kernel[(ceil_div(batch_size, rows),)](
            location,
            raw_scale,
            center,
            table,
            step,
            values,
            response,
            noise,
            n,
            batch_size,
            first_example,
            seed,
            rho_min,
            rho_max,
            SAVE_NOISE=noise is not None,
            N_PAD=n_pad,
            ROWS=rows,
            num_warps=NUM_WARPS,
        )


def perturb_backward(
    d_values: Tensor | None,
    d_response: Tensor | None,
    location: Tensor,
    raw_scale: Tensor,
    table: Tensor,
    noise: Tensor,
    rho_min: float,
    rho_max: float,
) -> tuple[Tensor, Tensor]:
    """(d_location (n,), d_raw_scale (n,)) from those gradients that are given, shaped as in the forward."""
    n, batch_size = noise.shape
    if not noise.numel():
        return torch.zeros_like(location), torch.zeros_like(raw_scale)
    n_pad, rows = _tile(n)
    programs = ceil_div(batch_size, rows)
    # One row of sums per program, added in a fixed order: the same bits at every run.
    partial = torch.empty(programs, 2, n, dtype=torch.float32, device=location.device)
    with device_guard(location):
        perturb_bwd_kernel[(programs,)](
            location,
            raw_scale,
            table,
            noise,
            d_values,
            d_response,
            partial,
            n,
            batch_size,
            rho_min,
            rho_max,
            HAS_D_VALUES=d_values is not None,
            HAS_D_RESPONSE=d_response is not None,
            N_PAD=n_pad,
            ROWS=rows,
            num_warps=NUM_WARPS,
        )
    return partial[:, 0].sum(0), partial[:, 1].sum(0)
