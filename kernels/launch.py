"""What every kernel needs: where it is launched, and whether Triton's interpreter stands in for the device."""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decided once, like @triton.jit itself: TRITON_INTERPRET is read where a kernel is defined.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(b, dtype: tl.constexpr):
    """float32 to the dtype of a result, rounded to nearest even. The interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        b = tl.where(b != b, b, rounded)
    return b.to(dtype)


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, which is where Triton launches; nothing to do for the interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, of sizes; triton.cdiv, which kernels can call too, takes ten times as long."""
    return -(-a // b)


def words_in_range(*values: int) -> tuple[int, ...]:
    """Counter words are 32 bits wide; Python's integers are brought there before a kernel sees them."""
    return tuple(value & 0xFFFFFFFF for value in values)


def refuse_float64(operation: str, **tensors: Tensor) -> None:
    """Kernels compute in float32, which would cost a float64 tensor half of its digits without a word."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise TypeError(f"{operation}: kernels compute in float32, and {name} is float64; use plain PyTorch for it")


def split(programs: int, tiles: int, at_least: int) -> tuple[int, int]:
    """(splits, tiles in each): a sum over tiles cut so that `programs` times the splits are `at_least` so many."""
    if not programs or not tiles:
        return 1, tiles
    splits = min(tiles, ceil_div(at_least, programs))
    each = ceil_div(tiles, splits)
    return ceil_div(tiles, each), each
