"""One time step of a gated LSTM: the cell itself, and a kernel for what surrounds the step's one library product.

Gates are in torch's order, i, f, g, o; pre = x's share + P + s ⊙ Q + shift with [P, Q] = h_{t−1} [W; R]ᵀ.

Tensors of the sequence are contiguous. In private buffers, h, dh, P, Q and their gradients, H hidden units take `row`
numbers; rows of P and Q begin `p_row` and `q_row` numbers apart. A program is BLOCK units of (B, row), those of the
padding among them.
"""

import triton
import triton.language as tl

from .launch import narrow

# The sizes of a step, (B, H), are small, so every multiprocessor needs blocks. A number a thread: with more, rows that
# begin at 16 bytes and others are laid out differently over threads, and exchanged through shared memory.
STEP_CONFIG = triton.Config({"BLOCK": 128}, num_warps=4)


@triton.jit
def tanh(b):
    """tanh from exp: neither libdevice nor inline assembly runs in the interpreter."""
    b_size = tl.abs(b)
    b_exp = tl.exp(-2.0 * b_size)
    # 1 - exp loses digits near zero; the series is exact to 2⁻²⁴ of its value there.
    b_2 = b * b
    b_near = 1.0 + b_2 * (-1 / 3 + b_2 * (2 / 15 + b_2 * (-17 / 315 + b_2 * (62 / 2835))))
    b_far = (1.0 - b_exp) / (1.0 + b_exp)
    return tl.where(b_size < 0.3, b * b_near, tl.where(b < 0, -b_far, b_far))


@triton.jit
def sigmoid(b):
    b_exp = tl.exp(-tl.abs(b))  # of -b it would overflow
    return tl.where(b < 0, b_exp, 1.0) / (1.0 + b_exp)


@triton.jit
def cell_forward(b_i, b_f, b_g, b_o, b_c_before):
    """(i, f, g, o, c, h): gates before their activations become c = f ⊙ c_before + i ⊙ g and h = o ⊙ tanh c."""
    b_i, b_f, b_g, b_o = sigmoid(b_i), sigmoid(b_f), tanh(b_g), sigmoid(b_o)
    b_c = b_f * b_c_before + b_i * b_g
    return b_i, b_f, b_g, b_o, b_c, b_o * tanh(b_c)


@triton.jit
def cell_backward(b_dh, b_dc, b_i, b_f, b_g, b_o, b_c, b_c_before):
    """(di, df, dg, do, dc_before), of the gates before their activations, which are what is given here."""
    b_tanh = tanh(b_c)
    b_dc += b_dh * b_o * (1.0 - b_tanh * b_tanh)
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_df = b_dc * b_c_before * b_f * (1.0 - b_f)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_do = b_dh * b_tanh * b_o * (1.0 - b_o)
    return b_di, b_df, b_dg, b_do, b_dc * b_f


@triton.jit
def gate(b_p, b_q, p_gates, p_scale, p_shift, p_response, i_gate, inside,
         HAS_SHIFT: tl.constexpr, SAVE_RESPONSE: tl.constexpr):  # fmt: skip
    """One gate before its activation, at `i_gate` of (B, 4H); `p_gates` is x's share. Keeps Q where SAVE_RESPONSE."""
    if SAVE_RESPONSE:
        tl.store(p_response + i_gate, narrow(b_q, p_gates.dtype.element_ty), mask=inside)
    b_before = tl.load(p_gates + i_gate, mask=inside, other=0.0).to(tl.float32) + b_p
    b_before += tl.load(p_scale + i_gate, mask=inside, other=0.0).to(tl.float32) * b_q
    if HAS_SHIFT:
        b_before += tl.load(p_shift + i_gate, mask=inside, other=0.0).to(tl.float32)
    return b_before


@triton.jit
def load_gates(p_gates, i_gate, inside, row):
    """i, f, g, o in float32, of which i is stored at `i_gate` and each other `row` numbers after the one before."""
    b_i = tl.load(p_gates + i_gate, mask=inside, other=0.0).to(tl.float32)
    b_f = tl.load(p_gates + i_gate + row, mask=inside, other=0.0).to(tl.float32)
    b_g = tl.load(p_gates + i_gate + 2 * row, mask=inside, other=0.0).to(tl.float32)
    b_o = tl.load(p_gates + i_gate + 3 * row, mask=inside, other=0.0).to(tl.float32)
    return b_i, b_f, b_g, b_o


@triton.jit
def store_gates(p_gates, b_i, b_f, b_g, b_o, i_gate, inside, row):
    """i, f, g, o, rounded, where `load_gates` finds them."""
    dtype: tl.constexpr = p_gates.dtype.element_ty
    tl.store(p_gates + i_gate, narrow(b_i, dtype), mask=inside)
    tl.store(p_gates + i_gate + row, narrow(b_f, dtype), mask=inside)
    tl.store(p_gates + i_gate + 2 * row, narrow(b_g, dtype), mask=inside)
    tl.store(p_gates + i_gate + 3 * row, narrow(b_o, dtype), mask=inside)


@triton.jit(do_not_specialize=["t"])
def gated_lstm_fwd_step_kernel(
    p_gates,
    p_p,
    p_q,
    p_scale,
    p_shift,
    p_cell,
    p_h,
    p_y,
    p_cells,
    p_response,
    t,
    batch,
    H,
    row,
    p_row,
    q_row,
    HAS_SHIFT: tl.constexpr,
    SAVE: tl.constexpr,
    SAVE_RESPONSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step t of gates (T, B, 4H), y and cells (T, B, H), Q like gates; P and Q (B, 4·row), cell (B, H), h (B, row).

    gates hold x's share on entry and the activated gates after it where SAVE; Q is kept where SAVE_RESPONSE. The state,
    `p_cell` in float32 and `p_h`, which the next product reads, is replaced.
    """
    dtype: tl.constexpr = p_h.dtype.element_ty
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_example, i_unit = i // row, i % row
    inside = (i_example < batch) & (i_unit < H)
    i_state = i_example * H + i_unit
    i_gate = i_example * (4 * H) + i_unit
    i_step = tl.cast(t, tl.int64) * batch * H
    p_gates += 4 * i_step
    if SAVE_RESPONSE:
        p_response += 4 * i_step

    b_pi, b_pf, b_pg, b_po = load_gates(p_p, i_example * p_row + i_unit, inside, row)
    b_qi, b_qf, b_qg, b_qo = load_gates(p_q, i_example * q_row + i_unit, inside, row)
    i_f, i_g, i_o = i_gate + H, i_gate + 2 * H, i_gate + 3 * H
    b_i = gate(b_pi, b_qi, p_gates, p_scale, p_shift, p_response, i_gate, inside, HAS_SHIFT, SAVE_RESPONSE)
    b_f = gate(b_pf, b_qf, p_gates, p_scale, p_shift, p_response, i_f, inside, HAS_SHIFT, SAVE_RESPONSE)
    b_g = gate(b_pg, b_qg, p_gates, p_scale, p_shift, p_response, i_g, inside, HAS_SHIFT, SAVE_RESPONSE)
    b_o = gate(b_po, b_qo, p_gates, p_scale, p_shift, p_response, i_o, inside, HAS_SHIFT, SAVE_RESPONSE)
    b_c = tl.load(p_cell + i_state, mask=inside, other=0.0)
    b_i, b_f, b_g, b_o, b_c, b_h = cell_forward(b_i, b_f, b_g, b_o, b_c)

    b_h = narrow(b_h, dtype)
    tl.store(p_cell + i_state, b_c, mask=inside)
    tl.store(p_h + i, b_h, mask=inside)
    tl.store(p_y + i_step + i_state, b_h, mask=inside)
    if SAVE:
        store_gates(p_gates, b_i, b_f, b_g, b_o, i_gate, inside, H)
        tl.store(p_cells + i_step + i_state, narrow(b_c, dtype), mask=inside)


@triton.jit(do_not_specialize=["t", "t_before"])
def gated_lstm_bwd_step_kernel(
    p_dy,
    p_gates,
    p_cells,
    p_c_0,
    p_dh,
    p_dc,
    p_scale,
    p_d_gates,
    p_d_p,
    p_d_q,
    t,
    t_before,
    batch,
    H,
    row,
    p_row,
    q_row,
    BLOCK: tl.constexpr,
):
    """Step t, which came after step t_before, or -1; dy, cells (T, B, H), gates, d_gates (T, B, 4H), c_0, dc (B, H).

    d_gates come from dh (B, row), what the later step's product gave, and from dc in float32, which becomes the step
    before's. The next product reads the gradients of P and Q (B, 4·row), whose padding stays as it is.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_example, i_unit = i // row, i % row
    inside = (i_example < batch) & (i_unit < H)
    i_state = i_example * H + i_unit
    i_gate = i_example * (4 * H) + i_unit
    i_step = tl.cast(t, tl.int64) * batch * H
    p_c_before = p_cells + tl.cast(t_before, tl.int64) * batch * H
    if t_before < 0:
        p_c_before = p_c_0

    b_dh = tl.load(p_dy + i_step + i_state, mask=inside, other=0.0).to(tl.float32)
    b_dh += tl.load(p_dh + i, mask=inside, other=0.0).to(tl.float32)
    b_dc = tl.load(p_dc + i_state, mask=inside, other=0.0)
    b_i, b_f, b_g, b_o = load_gates(p_gates + 4 * i_step, i_gate, inside, H)
    b_c = tl.load(p_cells + i_step + i_state, mask=inside, other=0.0).to(tl.float32)
    b_c_before = tl.load(p_c_before + i_state, mask=inside, other=0.0).to(tl.float32)
    b_di, b_df, b_dg, b_do, b_dc = cell_backward(b_dh, b_dc, b_i, b_f, b_g, b_o, b_c, b_c_before)

    tl.store(p_dc + i_state, b_dc, mask=inside)
    store_gates(p_d_gates + 4 * i_step, b_di, b_df, b_dg, b_do, i_gate, inside, H)
    store_gates(p_d_p, b_di, b_df, b_dg, b_do, i_example * p_row + i_unit, inside, row)
    b_si, b_sf, b_sg, b_so = load_gates(p_scale, i_gate, inside, H)
    i_q = i_example * q_row + i_unit
    store_gates(p_d_q, b_di * b_si, b_df * b_sf, b_dg * b_sg, b_do * b_so, i_q, inside, row)
