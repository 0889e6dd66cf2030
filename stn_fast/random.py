"""The package's random number generator, Philox 4x32-10: the readable reference in NumPy.

It is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123): a draw is a
function of its coordinates only, so the C++ core and the Triton kernels compute the same numbers.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counters: NDArray[np.integer], keys: NDArray[np.integer]) -> NDArray[np.uint32]:
    """Ten rounds of Philox 4x32: counters (..., 4) and keys (..., 2), values below 2³², → (..., 4) uint32.

    One round, with 32-bit words c₀..c₃, key k₀, k₁ and 64-bit products p₀ = M₀c₀, p₁ = M₁c₂:
    (c₀, c₁, c₂, c₃) ← (high(p₁) ⊕ c₁ ⊕ k₀, low(p₁), high(p₀) ⊕ c₃ ⊕ k₁, low(p₀)); then k₀, k₁ increase by constants.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counters, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(keys, np.uint64), -1, 0)
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def bits(seed: int, step: int, stream: int, examples: int, elements: int, first_example: int = 0) -> NDArray[np.uint32]:
    """(examples, elements) uint32: word `element mod 4` of counter (element div 4, example, step, stream).

    Row i belongs to example `first_example` + i of the global batch. The key is the 64-bit `seed`, low word first;
    example, step and stream are taken modulo 2³².
    """
    blocks = -(-elements // 4)
    counters = np.empty((examples, blocks, 4), np.uint64)
    counters[..., 0] = np.arange(blocks)
    counters[..., 1] = (np.arange(examples)[:, None] + first_example) & 0xFFFFFFFF
    counters[..., 2] = step & 0xFFFFFFFF
    counters[..., 3] = stream & 0xFFFFFFFF
    keys = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    return philox4x32(counters, keys).reshape(examples, 4 * blocks)[:, :elements]


def uniform(
    seed: int, step: int, stream: int, examples: int, elements: int, first_example: int = 0
) -> NDArray[np.float32]:
    """(examples, elements) float32 in [0, 1): (bits >> 8) · 2⁻²⁴, exact."""
    return (bits(seed, step, stream, examples, elements, first_example) >> 8).astype(np.float32) * np.float32(2**-24)


def normal(
    seed: int, step: int, stream: int, examples: int, elements: int, first_example: int = 0
) -> NDArray[np.float32]:
    """(examples, elements) float32, standard normal by Box–Muller on pairs of uniforms (a, b), computed in float64.

    n₀ = sqrt(−2 log(1 − a)) cos(2πb), n₁ = sqrt(−2 log(1 − a)) sin(2πb)

    The angle is first reduced by the nearest quarter turn, which is exact, so that a sine of 0 gives exactly 0.
    """
    pairs = -(-elements // 2)
    u = uniform(seed, step, stream, examples, 2 * pairs, first_example).astype(np.float64).reshape(examples, pairs, 2)
    quarter = np.rint(4 * u[..., 1])
    rest = 2 * np.pi * (u[..., 1] - quarter / 4)
    sine, cosine = np.sin(rest), np.cos(rest)
    turned = [[cosine, -sine, -cosine, sine], [sine, cosine, -sine, -cosine]]
    direction = [np.choose(quarter.astype(int) % 4, axis) for axis in turned]
    draws = np.sqrt(-2 * np.log1p(-u[..., 0]))[..., None] * np.stack(direction, axis=-1)
    return draws.reshape(examples, 2 * pairs)[:, :elements].astype(np.float32)
