"""A gated LSTM over a whole sequence in one launch, for layers so small that launches are what a step costs.

Each program owns BLOCK_B sequences and loops over time: no program waits for another, so there is no grid barrier. The
recurrent weights are read from the L2 cache at every step, UNITS hidden units at a time, all eight of a unit's rows:
W's and R's of its four gates. Products have weights as rows and sequences as columns, which fills the tensor cores'
64 rows however few sequences there are. Programs exchange nothing; the threads of one do so through memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gated_lstm_cell import cell_backward, cell_forward, gate, load_gates, store_gates
from .gated_lstm_steps import BackwardInputs, ForwardInputs
from .launch import narrow
from .matmul import dot

# More hidden units don't fit: a tile of weights has rows of all of them, in shared memory several times over.
MAX_HIDDEN = 256
DTYPES = (torch.bfloat16, torch.float16)


def sequence_config(units: int, batch: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"UNITS": units, "BLOCK_B": batch}, num_warps=warps, num_stages=stages)


# tests/kernels/test_compile_ahead.py builds each.
HOPPER_CONFIGS = [
    sequence_config(16, 16, 4, 3),
    sequence_config(16, 16, 8, 3),
    sequence_config(16, 32, 8, 2),
    sequence_config(8, 32, 8, 3),
]
# With mma.sync, a tile of weights that backward reads the other way round goes through registers: larger ones spill.
AMPERE_CONFIGS = [sequence_config(8, 16, 8, 2), sequence_config(8, 32, 8, 2)]


def config_name(config: triton.Config) -> str:
    units, batch = config.kwargs["UNITS"], config.kwargs["BLOCK_B"]
    return f"sequence-{units}x{batch}-w{config.num_warps}-s{config.num_stages}"


@triton.jit
def weight_tile(p_weights, i_first, HIDDEN: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows of units i_first, ... of W and R, (8·UNITS, BLOCK_K), in the order (W or R, gate, unit)."""
    i_row = tl.arange(0, 8 * UNITS)
    i_unit = i_first + i_row % UNITS
    # Units past the end read the first instead of being masked: what they give isn't used.
    i_weight = i_row // UNITS * HIDDEN + tl.where(i_unit < HIDDEN, i_unit, 0)
    i_k = tl.arange(0, BLOCK_K)
    return tl.load(p_weights + i_weight[:, None] * HIDDEN + i_k[None, :], mask=(i_k < HIDDEN)[None, :], other=0.0)


@triton.jit
def four(b_gates):
    """i, f, g, o of (units, sequences, 2, 2), the gate's number being 2·(last) + (last but one)."""
    b_if, b_go = tl.split(b_gates)
    b_i, b_f = tl.split(b_if)
    b_g, b_o = tl.split(b_go)
    return b_i, b_f, b_g, b_o


@triton.jit
def joined(b_i, b_f, b_g, b_o):
    """The inverse of `four`."""
    return tl.join(tl.join(b_i, b_f), tl.join(b_g, b_o))


@triton.jit
def gated_lstm_fwd_sequence_kernel(
    p_gates,
    p_h_0,
    p_weights,
    p_scale,
    p_shift,
    p_cell,
    p_y,
    p_cells,
    p_response,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_RESPONSE: tl.constexpr,
    REVERSE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As the steps of gated_lstm_cell; `p_cell` (B, H) in float32 holds c_0 on entry and c_n afterwards."""
    dtype: tl.constexpr = p_y.dtype.element_ty
    i_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = i_b < batch
    i_k = tl.arange(0, BLOCK_K)
    inside_h = (i_k < HIDDEN)[:, None] & in_b[None, :]
    p_h = p_h_0
    for step in range(0, steps):
        t = step
        if REVERSE:
            t = steps - 1 - step
        i_step = tl.cast(t, tl.int64) * batch
        p_x, p_q = p_gates + 4 * HIDDEN * i_step, p_response + 4 * HIDDEN * i_step
        b_h = tl.load(p_h + i_b[None, :] * HIDDEN + i_k[:, None], mask=inside_h, other=0.0)
        for i_first in range(0, HIDDEN, UNITS):
            b_weights = weight_tile(p_weights, i_first, HIDDEN, UNITS, BLOCK_K)
            b_both = dot(b_weights, b_h, tl.zeros((8 * UNITS, BLOCK_B), tl.float32), "ieee")
            b_both = tl.permute(tl.reshape(b_both, (2, 2, 2, UNITS, BLOCK_B)), (3, 4, 2, 1, 0))
            b_p, b_q = tl.split(b_both)
            b_pi, b_pf, b_pg, b_po = four(b_p)
            b_qi, b_qf, b_qg, b_qo = four(b_q)
            i_unit = i_first + tl.arange(0, UNITS)
            inside = (i_unit < HIDDEN)[:, None] & in_b[None, :]
            i_gate = i_b[None, :] * (4 * HIDDEN) + i_unit[:, None]
            i_f, i_g, i_o = i_gate + HIDDEN, i_gate + 2 * HIDDEN, i_gate + 3 * HIDDEN
            b_i = gate(b_pi, b_qi, p_x, p_scale, p_shift, p_q, i_gate, inside, HAS_SHIFT, SAVE_RESPONSE)
            b_f = gate(b_pf, b_qf, p_x, p_scale, p_shift, p_q, i_f, inside, HAS_SHIFT, SAVE_RESPONSE)
            b_g = gate(b_pg, b_qg, p_x, p_scale, p_shift, p_q, i_g, inside, HAS_SHIFT, SAVE_RESPONSE)
            b_o = gate(b_po, b_qo, p_x, p_scale, p_shift, p_q, i_o, inside, HAS_SHIFT, SAVE_RESPONSE)
            i_state = i_b[None, :] * HIDDEN + i_unit[:, None]
            b_c = tl.load(p_cell + i_state, mask=inside, other=0.0)
            b_i, b_f, b_g, b_o, b_c, b_h_new = cell_forward(b_i, b_f, b_g, b_o, b_c)
            tl.store(p_cell + i_state, b_c, mask=inside)
            tl.store(p_y + HIDDEN * i_step + i_state, narrow(b_h_new, dtype), mask=inside)
            if SAVE:
                store_gates(p_x, b_i, b_f, b_g, b_o, i_gate, inside, HIDDEN)
                tl.store(p_cells + HIDDEN * i_step + i_state, narrow(b_c, dtype), mask=inside)
        # The next step reads what other threads of this program have written.
        p_h = p_y + HIDDEN * i_step
        tl.debug_barrier()


@triton.jit
def gated_lstm_bwd_sequence_kernel(
    p_dy,
    p_gates,
    p_cells,
    p_c_0,
    p_weights,
    p_scale,
    p_dc,
    p_dh,
    p_d_gates,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    REVERSE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As the steps of gated_lstm_cell; dc and dh (B, H) in float32 are of the last state on entry, then of the first.

    dh of a step, all units by BLOCK_B sequences, gathers in registers: each tile of weights meets the gradients of its
    own gates as soon as they are there.
    """
    dtype: tl.constexpr = p_dy.dtype.element_ty
    i_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = i_b < batch
    i_k = tl.arange(0, BLOCK_K)
    for step in range(0, steps):
        t = steps - 1 - step
        t_before = t - 1
        if REVERSE:
            t = step
            t_before = t + 1
        i_step = tl.cast(t, tl.int64) * batch
        p_c_before = p_cells + HIDDEN * (tl.cast(t_before, tl.int64) * batch)
        if step == steps - 1:
            p_c_before = p_c_0
        b_dh_before = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
        for i_first in range(0, HIDDEN, UNITS):
            b_weights = weight_tile(p_weights, i_first, HIDDEN, UNITS, BLOCK_K)
            i_unit = i_first + tl.arange(0, UNITS)
            inside = (i_unit < HIDDEN)[:, None] & in_b[None, :]
            i_state = i_b[None, :] * HIDDEN + i_unit[:, None]
            i_gate = i_b[None, :] * (4 * HIDDEN) + i_unit[:, None]
            b_dh = tl.load(p_dy + HIDDEN * i_step + i_state, mask=inside, other=0.0).to(tl.float32)
            b_dh += tl.load(p_dh + i_state, mask=inside, other=0.0)
            b_dc = tl.load(p_dc + i_state, mask=inside, other=0.0)
            b_c = tl.load(p_cells + HIDDEN * i_step + i_state, mask=inside, other=0.0).to(tl.float32)
            b_c_before = tl.load(p_c_before + i_state, mask=inside, other=0.0).to(tl.float32)
            b_i, b_f, b_g, b_o = load_gates(p_gates + 4 * HIDDEN * i_step, i_gate, inside, HIDDEN)
            b_di, b_df, b_dg, b_do, b_dc = cell_backward(b_dh, b_dc, b_i, b_f, b_g, b_o, b_c, b_c_before)
            tl.store(p_dc + i_state, b_dc, mask=inside)
            store_gates(p_d_gates + 4 * HIDDEN * i_step, b_di, b_df, b_dg, b_do, i_gate, inside, HIDDEN)
            b_si, b_sf, b_sg, b_so = load_gates(p_scale, i_gate, inside, HIDDEN)
            b_d_q = joined(b_di * b_si, b_df * b_sf, b_dg * b_sg, b_do * b_so)
            b_both = tl.permute(tl.join(joined(b_di, b_df, b_dg, b_do), b_d_q), (4, 3, 2, 0, 1))
            b_both = narrow(tl.reshape(b_both, (8 * UNITS, BLOCK_B)), dtype)
            b_dh_before = dot(tl.trans(b_weights), b_both, b_dh_before, "ieee")
        # Every thread of this program has read the later step's dh before one writes this one's, and the reverse.
        tl.debug_barrier()
        i_dh = i_b[None, :] * HIDDEN + i_k[:, None]
        tl.store(p_dh + i_dh, b_dh_before, mask=(i_k < HIDDEN)[:, None] & in_b[None, :])
        tl.debug_barrier()


def applies(dtype: torch.dtype, hidden: int) -> bool:
    """Whether a sequence in one launch may be worth it.

    float32 has no tensor cores, large layers have no room, and rows that don't begin at 16 bytes are read slowly.
    """
    return dtype in DTYPES and hidden <= MAX_HIDDEN and hidden % 8 == 0


def padded(hidden: int) -> int:
    """The length of a row of weights in a tile; in backward they are its rows, and tensor cores want 64."""
    return max(64, triton.next_power_of_2(hidden))


def configs(capability: tuple[int, int]) -> list[triton.Config]:
    return HOPPER_CONFIGS if capability >= (9, 0) else AMPERE_CONFIGS


def _options(batch: int, hidden: int, config: triton.Config) -> tuple[tuple[int], dict[str, object]]:
    sizes = {"HIDDEN": hidden, "BLOCK_K": padded(hidden)}
    grid = (triton.cdiv(batch, config.kwargs["BLOCK_B"]),)
    return grid, sizes | config.kwargs | {"num_warps": config.num_warps, "num_stages": config.num_stages}


def forward(inputs: ForwardInputs, reverse: bool, config: triton.Config) -> tuple[Tensor]:
    """(c_n,), and the tensors to be written in `inputs`."""
    gates, h_0, c_0, weight, response_weight, scale, shift, y, cells, response = inputs
    steps, batch, hidden = y.shape
    cell = c_0.to(torch.float32, copy=True)
    grid, options = _options(batch, hidden, config)
    gated_lstm_fwd_sequence_kernel[grid](
        gates, h_0, torch.cat([weight, response_weight]), scale, shift, cell, y,
        y if cells is None else cells, y if response is None else response, steps, batch,
        HAS_SHIFT=shift is not None, SAVE=cells is not None, SAVE_RESPONSE=response is not None, REVERSE=reverse,
        **options,
    )  # fmt: skip
    return (cell.to(y.dtype),)


def backward(inputs: BackwardInputs, reverse: bool, config: triton.Config) -> tuple[Tensor, Tensor]:
    """(dh_0, dc_0 in float32), and d_gates in `inputs`."""
    dy, gates, cells, c_0, weight, response_weight, scale, dc, d_gates = inputs
    steps, batch, hidden = dy.shape
    dh, dc_0 = (torch.zeros_like(c_0, dtype=torch.float32) for _ in range(2))
    if dc is not None:
        dc_0.copy_(dc)
    grid, options = _options(batch, hidden, config)
    gated_lstm_bwd_sequence_kernel[grid](
        dy, gates, cells, c_0, torch.cat([weight, response_weight]), scale, dc_0, dh, d_gates, steps, batch,
        REVERSE=reverse, **options,
    )  # fmt: skip
    return dh.to(dy.dtype), dc_0
