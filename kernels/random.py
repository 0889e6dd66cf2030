"""Philox 4x32-10 and what is made of its words, as helpers for the other kernels.

key = (seed & 0xffffffff, seed >> 32); counter = (element // 4, example, step, stream); word `element % 4` belongs to
`element`. The polynomials are those of csrc/elementary.h, so that CPU and GPU differ by rounding alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import device_guard, words_in_range


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 blocks or scalars; shapes broadcast, so what a tile shares is computed once."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = tl.mul(c0, 0xD2511F53, sanitize_overflow=False)
        low2 = tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False)
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def draw_words(quad, example, p_step, seed, stream):
    """The four words of each quad (element // 4) of each example; `step` is read here, so a CUDA graph sees it move."""
    step = tl.load(p_step).to(tl.uint32)
    wide = seed.to(tl.uint64)
    k0, k1 = (wide & 0xFFFFFFFF).to(tl.uint32), (wide >> 32).to(tl.uint32)
    return philox(quad.to(tl.uint32), example.to(tl.uint32), step, stream.to(tl.uint32), k0, k1)


@triton.jit
def in_element_order(b0, b1, b2, b3):
    """Four (..., Q) blocks, one per word, become (..., 4 Q): element 4 q + j from block j."""
    return tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))


@triton.jit
def word_of(element, w0, w1, w2, w3):
    """The one word that belongs to an element, where neighbours don't share a counter."""
    lane = element & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def uniform_of(word):
    """A step of 2^-24 in [0, 1): exact in float32."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def log_positive(x):
    """log(x) for normal x > 0, with full relative precision near 1: x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2))."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - exponent * 8388608).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = f * -0.07634492963552475 + 0.12761574983596802
    p = p * f - 0.13160182535648346
    p = p * f + 0.14201758801937103
    p = p * f - 0.16623356938362122
    p = p * f + 0.20001226663589478
    p = p * f - 0.2500081956386566
    p = p * f + 0.3333333134651184
    # log 2 in two parts: the product of the first with e is exact.
    return (f + (f * f * (f * p - 0.5) + e * -2.12194440e-4)) + e * 0.693359375


@triton.jit
def sincos_reduced(quarter, f):
    """sin and cos of quarter / 4 + f turns, f in [-1/8, 1/8]."""
    f2 = f * f
    s = f2 * -75.39356231689453 + 81.59235382080078
    s = s * f2 - 41.3416633605957
    s = (s * f2 + 6.2831854820251465) * f
    c = f2 * 59.229244232177734 - 85.4432373046875
    c = c * f2 + 64.93932342529297
    c = c * f2 - 19.739208221435547
    c = c * f2 + 1.0
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    return tl.where((quarter & 2) != 0, -sine, sine), tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def sincos_turns(steps):
    """sin and cos of 2 pi steps / 2^24, reduced exactly to the nearest quarter turn and a rest in [-1/8, 1/8]."""
    quarter = (steps + 2097152) >> 22
    return sincos_reduced(quarter, (steps - quarter * 4194304).to(tl.float32) * 5.9604644775390625e-08)


@triton.jit
def normals_of(word_a, word_b):
    """Box-Muller. 1 - u is exact and never 0, so the logarithm is finite."""
    radius = tl.sqrt_rn(-2.0 * log_positive(1.0 - uniform_of(word_a)))
    sine, cosine = sincos_turns((word_b >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def normal_of(element, w0, w1, w2, w3):
    """The one normal that belongs to an element, where neighbours don't share a counter."""
    first = (element & 2) == 0
    n_even, n_odd = normals_of(tl.where(first, w0, w2), tl.where(first, w1, w3))
    return tl.where((element & 1) == 0, n_even, n_odd)


@triton.jit
def normals_in_order(w0, w1, w2, w3):
    """Four standard normals per quad, in element order."""
    n0, n1 = normals_of(w0, w1)
    n2, n3 = normals_of(w2, w3)
    return in_element_order(n0, n1, n2, n3)


@triton.jit
def quads_of_rows(base, i_tile, ALIGNED: tl.constexpr, COLS: tl.constexpr):
    """For rows whose first element is `base` (int64): the quads of one tile of columns, and the columns they belong to.

    A row that starts in the middle of a quad starts at a column below 0, so that no quad is drawn twice within a row.
    """
    quad = i_tile * (COLS // 4) + tl.arange(0, COLS // 4)
    column = i_tile * COLS + tl.arange(0, COLS)
    if ALIGNED:
        return (base // 4)[:, None] + quad[None, :], column[None, :]
    else:
        return (base // 4)[:, None] + quad[None, :], column[None, :] - (base % 4).to(tl.int32)[:, None]


@triton.jit
def philox_kernel(p_counters, p_keys, p_out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    w0, w1, w2, w3 = philox(
        tl.load(p_counters + 4 * i, mask=inside, other=0),
        tl.load(p_counters + 4 * i + 1, mask=inside, other=0),
        tl.load(p_counters + 4 * i + 2, mask=inside, other=0),
        tl.load(p_counters + 4 * i + 3, mask=inside, other=0),
        tl.load(p_keys + 2 * i, mask=inside, other=0),
        tl.load(p_keys + 2 * i + 1, mask=inside, other=0),
    )
    tl.store(p_out + 4 * i, w0, mask=inside)
    tl.store(p_out + 4 * i + 1, w1, mask=inside)
    tl.store(p_out + 4 * i + 2, w2, mask=inside)
    tl.store(p_out + 4 * i + 3, w3, mask=inside)


@triton.jit(do_not_specialize=["first_example", "seed", "stream"])
def draw_kernel(
    p_step,
    p_out,
    elements,
    first_example,
    seed,
    stream,
    KIND: tl.constexpr,
    COLS: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_quad = i_tile * (COLS // 4) + tl.arange(0, COLS // 4)
    w0, w1, w2, w3 = draw_words(i_quad, first_example + i_row, p_step, seed, stream)
    if KIND == "bits":
        b_out = in_element_order(w0, w1, w2, w3)
    elif KIND == "uniform":
        b_out = uniform_of(in_element_order(w0, w1, w2, w3))
    else:
        b_out = normals_in_order(w0, w1, w2, w3)
    i_column = i_tile * COLS + tl.arange(0, COLS)
    tl.store(p_out + i_row * elements + i_column, b_out, mask=i_column < elements)


DRAW_COLUMNS = 1024
MAX_DRAW = 65535 * DRAW_COLUMNS  # as many tiles as the second dimension of a grid may count


def philox_bits(counters: Tensor, keys: Tensor) -> Tensor:
    """Philox 4x32-10 of each row: counters (N, 4), keys (N, 2), result (N, 4), all uint32."""
    out = torch.empty_like(counters)
    if counters.shape[0]:
        with device_guard(counters):
            philox_kernel[(triton.cdiv(counters.shape[0], 256),)](counters, keys, out, counters.shape[0], BLOCK=256)
    return out


def draw(
    kind: str, examples: int, elements: int, step: Tensor, seed: int, stream: int, first_example: int = 0
) -> Tensor:
    """(examples, elements) numbers of one kind: "bits" uint32, "uniform" or "normal" float32."""
    if elements > MAX_DRAW:
        raise ValueError(f"draw: at most {MAX_DRAW} elements of an example; got elements={elements}")
    dtype = torch.uint32 if kind == "bits" else torch.float32
    out = torch.empty(examples, elements, dtype=dtype, device=step.device)
    first_example, stream = words_in_range(first_example, stream)
    if out.numel():
        with device_guard(out):
            draw_kernel[(examples, triton.cdiv(elements, DRAW_COLUMNS))](
                step, out, elements, first_example, seed, stream, KIND=kind, COLS=DRAW_COLUMNS
            )
    return out
