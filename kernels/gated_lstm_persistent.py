"""The recurrence of a gated LSTM in one launch for all time steps: CUDA C++ in kernels/cuda, for bfloat16.

Blocks keep their shares of W_hh and R_hh in shared memory from the first step to the last, and wait for each other
between steps. So all of them must be resident at once, which bounds H by what the device's shared memory holds;
`why_not` says where a size doesn't fit.

The code is compiled at first use, for the sizes at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cooperative import launch, unavailable
from .launch import ceil_div, device_guard

SOURCE = Path(__file__).with_name("cuda") / "gated_lstm_persistent.cu"
# As kernels/cuda/tiles.h has them.
WARPS = 8
THREADS = 32 * WARPS
TILE_ROWS = TILE_DEPTH = 16
TILE_COLUMNS = 8
GATES = 4
PARTS = 2 * GATES
MAX_EXAMPLES = 128
# Of a thread's 255 registers, those that factors and sums of one pass may take.
PASS_REGISTERS = 144
# Cells of a step that a thread may have in its registers in backward; with six, some were spilled.
CELLS = 5
# Bytes of shared memory that forward keeps for a tile, `Kept` of kernels/cuda/gated_lstm_persistent.cu.
KEPT_BYTES = 5 * 32 * 4


class Limits(NamedTuple):
    """What a device offers: its multiprocessors, and the shared memory that a block may ask for."""

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Plan:
    """How a launch cuts up its work; `Shape` of kernels/cuda/tiles.h has the same arithmetic."""

    hidden: int
    row_tiles: int
    column_tiles: int
    at_once: int
    blocks: int
    kept_bytes: int  # of a tile, from step to step

    @property
    def shape(self) -> str:
        return f"stn_fast::Shape<{self.hidden}, {self.row_tiles}, {self.column_tiles}, {self.at_once}>"

    @property
    def shared_bytes(self) -> int:
        weights = ceil_div(self.hidden, TILE_DEPTH) * self.column_tiles * 32 * 8
        shares = WARPS * self.at_once * self.column_tiles * 32 * 16
        return weights + shares + self.row_tiles * self.column_tiles * self.kept_bytes

    @property
    def left_bytes(self) -> int:
        """Of one left factor, (B, H) in whole tiles."""
        return self.row_tiles * TILE_ROWS * ceil_div(self.hidden, TILE_DEPTH) * TILE_DEPTH * 2

    @property
    def slices(self) -> int:
        """Of columns, in backward."""
        return self.blocks // PARTS


@lru_cache
def plan_forward(batch: int, hidden: int, limits: Limits) -> Plan | str:
    """A block owns some hidden units, a tile of columns each: as few as there are multiprocessors for."""
    units = ceil_div(hidden, limits.multiprocessors)
    return _fit(batch, hidden, units, ceil_div(hidden, units), KEPT_BYTES, limits)


@lru_cache
def plan_backward(batch: int, hidden: int, limits: Limits) -> Plan | str:
    """PARTS blocks, a gate of one branch each, share a slice of the columns."""
    most = limits.multiprocessors // PARTS
    if most == 0:
        return f"backward takes {PARTS} multiprocessors at least, and the device has {limits.multiprocessors}"
    tiles = ceil_div(hidden, TILE_COLUMNS * most)
    plan = _fit(batch, hidden, tiles, PARTS * ceil_div(hidden, TILE_COLUMNS * tiles), 0, limits)
    if isinstance(plan, str):
        return plan
    cells = ceil_div(plan.row_tiles * TILE_ROWS * hidden, plan.blocks * THREADS)
    if cells > CELLS:
        return f"{batch} examples of {hidden} hidden units are {cells} cells a thread, whose registers hold {CELLS}"
    return plan


def _fit(batch: int, hidden: int, column_tiles: int, blocks: int, kept_bytes: int, limits: Limits) -> Plan | str:
    """The plan that multiplies as many tiles of rows at once as registers and shared memory hold; or why none fits."""
    row_tiles = ceil_div(batch, TILE_ROWS)
    depth_of_warp = ceil_div(ceil_div(hidden, TILE_DEPTH), WARPS)
    for at_once in range(row_tiles, 0, -1):
        plan = Plan(hidden, row_tiles, column_tiles, at_once, blocks, kept_bytes)
        if plan.shared_bytes <= limits.shared_bytes and 4 * at_once * (column_tiles + depth_of_warp) <= PASS_REGISTERS:
            return plan
    registers = 4 * (column_tiles + depth_of_warp)
    return (
        f"{batch} examples of {hidden} hidden units don't fit: {column_tiles} tiles of columns in each of {blocks} "
        f"blocks take {plan.shared_bytes} bytes of shared memory and {registers} registers a thread, and there are "
        f"{limits.shared_bytes} and {PASS_REGISTERS}"
    )


@cache
def _limits(device: torch.device) -> Limits:
    properties: Any = torch.cuda.get_device_properties(device)
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def why_not(batch: int, hidden: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the recurrence of these sizes can't run here; None when it can."""
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, and the tensors are {dtype}"
    if not 1 <= batch <= MAX_EXAMPLES:
        return f"it takes 1 to {MAX_EXAMPLES} examples, and there are {batch}"
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the tensors are on {device.type!r}"
    if reason := unavailable():
        return f"cuda.bindings and NVRTC compile it, and can't be used ({reason}): pip install 'stn-fast[cuda]'"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its tensor core instructions need compute capability 8.0 or newer"
    plans = (plan(batch, hidden, _limits(device)) for plan in (plan_forward, plan_backward))
    return next((plan for plan in plans if isinstance(plan, str)), None)


def _launch(expression: str, plan: Plan, arguments: tuple[int, ...], device: torch.device) -> None:
    launch(SOURCE, expression, plan.blocks, THREADS, plan.shared_bytes, arguments, device)


def _workspace(like: Tensor, left_factors: int, plan: Plan) -> tuple[Tensor, int, int]:
    """(zeros, address of left factors, address of the barrier's counter), one piece of memory."""
    counter_at = left_factors * plan.left_bytes
    memory = like.new_zeros(counter_at + 16, dtype=torch.uint8)
    return memory, memory.data_ptr(), memory.data_ptr() + counter_at


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    gates: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    reverse: bool,
    save: bool,
    save_response: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y (T, B, H), c_n (B, H), cell states (T, B, H) with `save`, h_{t−1} Rᵀ (T, B, 4H) with `save_response`).

    gates (T, B, 4H) hold x's share on entry and, where `save`, are activated in place. h_0, c_0 (B, H); W, R (4H, H);
    scale, shift (B, 4H), the gates of hyperparameters h Gwᵀ and b + (h Gbᵀ) ⊙ r. All are contiguous and bfloat16. The
    cell state is float32 from step to step.

    Raises:
        ValueError: the sizes don't fit this device; `why_not` would have said so.
    """
    steps, batch, wide = gates.shape
    plan = plan_forward(batch, wide // GATES, _limits(gates.device))
    if isinstance(plan, str):
        raise ValueError(f"gated_lstm: {plan}")
    y, c_n = gates.new_empty(steps, batch, plan.hidden), torch.empty_like(c_0)
    cells = torch.empty_like(y) if save else None
    response = torch.empty_like(gates) if save_response else None
    flags = ", ".join(str(flag).lower() for flag in (shift is not None, save, save_response))
    with device_guard(gates):
        memory, exchange, counter = _workspace(gates, 2, plan)
        tensors = (gates, h_0, c_0, weight, response_weight, scale, shift, y, c_n, cells, response)
        arguments = (*map(_address, tensors), exchange, counter, steps, batch, int(reverse))
        _launch(f"stn_fast::gated_lstm_forward<{plan.shape}, {flags}>", plan, arguments, gates.device)
    del memory
    return y, c_n, cells, response


def backward(
    dy: Tensor,
    d_last_cell: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    scale: Tensor,
    reverse: bool,
    want_h_0: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_gates (T, B, 4H), before the activations, dh_0 (B, H) where wanted, dc_0 (B, H) in float32).

    From what `forward` kept and the gradients of y and of the last cell state.
    """
    steps, batch, hidden = dy.shape
    plan = plan_backward(batch, hidden, _limits(dy.device))
    if isinstance(plan, str):
        raise ValueError(f"gated_lstm: {plan}")
    d_gates, d_c_0 = torch.empty_like(gates), torch.empty_like(c_0, dtype=torch.float32)
    d_h_0 = torch.empty_like(c_0) if want_h_0 else None
    rows, columns = plan.row_tiles * TILE_ROWS, plan.slices * plan.column_tiles * TILE_COLUMNS
    with device_guard(dy):
        memory, exchange, counter = _workspace(dy, PARTS, plan)
        products = dy.new_empty(PARTS, rows, columns, dtype=torch.float32)
        tensors = (dy, d_last_cell, gates, cells, c_0, weight, response_weight, scale, d_gates, d_h_0, d_c_0)
        arguments = (*map(_address, tensors), exchange, _address(products), counter, steps, batch, int(reverse))
        _launch(f"stn_fast::gated_lstm_backward<{plan.shape}>", plan, arguments, dy.device)
    del memory
    return d_gates, d_h_0, d_c_0
