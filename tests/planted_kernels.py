"""Kernels that the compile-ahead tests must reject."""

import triton
import triton.language as tl


@triton.jit
def serialised_kernel(p_a, p_b, p_out, K, BLOCK: tl.constexpr):
    """Products in a loop that may be empty, one with an operand from registers: ptxas serialises them."""
    i = tl.arange(0, BLOCK)
    p_a_tile, p_b_tile = p_a + i[:, None] * K + i[None, :], p_b + i[:, None] * BLOCK + i[None, :]
    b_out = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, K, BLOCK):
        b_a, b_b = tl.load(p_a_tile), tl.load(p_b_tile)
        b_out = tl.dot(b_a * 2.0, b_b, b_out)
        b_out = tl.dot(b_a, b_b, b_out)
        p_a_tile += BLOCK
        p_b_tile += BLOCK * BLOCK
    tl.store(p_out + i[:, None] * BLOCK + i[None, :], b_out)
