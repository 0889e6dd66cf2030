"""What the matrix kernels of gated layers share: tiles that fit their two accumulators, and how those are worked on."""

import torch
import triton
import triton.language as tl

from .launch import INTERPRETED


def matrix_config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    """A tile of m by n, summed in steps of k."""
    kwargs = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return triton.Config(kwargs, num_warps=warps, num_stages=stages)


# Every configuration that may ship; tests/kernels/test_compile_ahead.py builds each. BLOCK_M by BLOCK_N is the tile of
# the result, BLOCK_K the length of a step along the sum. All matrix kernels share them.
HOPPER_CONFIGS = [
    matrix_config(128, 128, 64, 8, 3),
    matrix_config(128, 64, 64, 8, 3),
    matrix_config(64, 128, 64, 8, 3),
    matrix_config(64, 64, 64, 4, 4),
    matrix_config(64, 32, 64, 4, 4),
]
# Two accumulators of 128 by 128 spill with mma.sync.
AMPERE_CONFIGS = [
    matrix_config(128, 64, 32, 8, 4),
    matrix_config(64, 128, 32, 8, 3),
    matrix_config(64, 64, 32, 4, 4),
    matrix_config(64, 32, 32, 4, 3),
]
# Rows that don't begin at 16 bytes are read number by number, through registers: larger tiles spill.
UNALIGNED_CONFIGS = [matrix_config(64, 64, 32, 8, 3), matrix_config(64, 32, 32, 4, 3)]
# float32 products run on the ordinary units unless TF32 is allowed: registers limit a tile, not shared memory.
FLOAT32_CONFIGS = [matrix_config(64, 64, 16, 8, 2), matrix_config(32, 64, 16, 4, 3), matrix_config(16, 32, 16, 4, 3)]


def configs(dtype: torch.dtype, aligned: bool, capability: tuple[int, int]) -> list[triton.Config]:
    """What may run: `aligned` says that rows have multiples of 16 numbers, as Triton's specialisation wants them."""
    if dtype == torch.float32:
        return FLOAT32_CONFIGS if aligned else FLOAT32_CONFIGS[1:]
    if not aligned:
        return UNALIGNED_CONFIGS
    return HOPPER_CONFIGS if capability >= (9, 0) else AMPERE_CONFIGS


def config_name(config: triton.Config) -> str:
    tile = "x".join(str(config.kwargs[axis]) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return f"{tile}-w{config.num_warps}-s{config.num_stages}"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. The interpreter holds bfloat16 as bare bits and multiplies those, so it's given float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_order(i_program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tiles in bands of GROUP_M rows, so that programs at work together share operands in the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    band = i_program // (GROUP_M * tiles_n)
    first = band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = i_program % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def halves(b_tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of a tile; registers are renamed, nothing moves."""
    return tl.split(tl.permute(tl.reshape(b_tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
