"""The C++ core. Tensors travel as addresses (`data_ptr()`) of contiguous float32; 0 is an absent or unwanted one.

Nothing is checked here: the operations in `stn_fast.ops` validate and allocate. The GIL is released; results don't
depend on `threads`. Formulas are in the headers of csrc/.
"""

def isa() -> str:
    """The instruction set in use: "x86-64-v4" (AVX-512), "x86-64-v3" (AVX2) or "baseline"."""

def vendor() -> str:
    """Who made the processor: "amd", "intel" or "other"."""

def openmp() -> bool:
    """Whether the core was built to use several threads."""

def full_team(max_threads: int, dynamic: int, thread_limit: int, active_level: int, max_active_levels: int) -> bool:
    """Whether a parallel region gets omp_get_max_threads() threads; addresses of OpenMP's functions of these names."""

def philox(counters: int, keys: int, out: int, count: int, threads: int) -> None:
    """Philox 4x32-10 of uint32 counters (count, 4) and keys (count, 2)."""

def uniform(
    out: int, examples: int, elements: int, first_example: int, seed: int, step: int, stream: int, threads: int
) -> None:
    """Uniforms in [0, 1) into out (examples, elements)."""

def normal(
    out: int, examples: int, elements: int, first_example: int, seed: int, step: int, stream: int, threads: int
) -> None:
    """Standard normals into out (examples, elements)."""

def perturb_forward(
    location: int,
    raw_scale: int,
    center: int,
    table: int,
    values: int,
    response: int,
    noise: int,
    n: int,
    batch: int,
    first_example: int,
    seed: int,
    step: int,
    rho_min: float,
    rho_max: float,
    threads: int,
) -> None:
    """Every example's own hyperparameters: response (batch, n); values and, where wanted, normal draws (n, batch)."""

def perturb_backward(
    d_values: int,
    d_values_in_rows: bool,
    d_response: int,
    location: int,
    raw_scale: int,
    table: int,
    noise: int,
    d_location: int,
    d_raw_scale: int,
    n: int,
    batch: int,
    rho_min: float,
    rho_max: float,
    threads: int,
) -> None:
    """Gradients of location and raw_scale (n,)."""

def dropout(
    x: int,
    rate: int,
    y: int,
    outer: int,
    batch: int,
    middle: int,
    last: int,
    e_outer: int,
    e_middle: int,
    e_last: int,
    first_example: int,
    seed: int,
    step: int,
    stream: int,
    threads: int,
) -> None:
    """y = x · keep / (1 − rate of the example) over (outer, batch, middle, last); also the backward pass, given dy."""

def noise_forward(
    x: int,
    scale: int,
    y: int,
    outer: int,
    batch: int,
    inner: int,
    first_example: int,
    seed: int,
    step: int,
    stream: int,
    threads: int,
) -> None:
    """y = x + scale of the example · normal, over (outer, batch, inner)."""

def noise_backward(
    dy: int,
    d_scale: int,
    outer: int,
    batch: int,
    inner: int,
    first_example: int,
    seed: int,
    step: int,
    stream: int,
    threads: int,
) -> None:
    """d_scale (batch,) = sum of dy · normal over each example; the normals are drawn again."""

def augment(
    images: int,
    table: int,
    mean: int,
    std: int,
    out: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    mask: int,
    flip: float,
    crop_padding: int,
    first_example: int,
    seed: int,
    step: int,
    stream: int,
    threads: int,
) -> None:
    """uint8 images (batch, channels, height, width) to augmented, normalised floats; table (13, batch) of strengths."""

def gated_embedding_forward(
    tokens: int,
    weight: int,
    response_weight: int,
    s: int,
    scale: int,
    e: int,
    rows: int,
    batch: int,
    inner: int,
    width: int,
    threads: int,
) -> None:
    """e[m] = scale[t] (weight[t] + s[b] ⊙ response_weight[t]), t = tokens[m] and b the example of row m."""

def gated_embedding_backward(
    de: int,
    tokens: int,
    response_weight: int,
    s: int,
    scale: int,
    d_weight: int,
    d_response_weight: int,
    d_s: int,
    rows: int,
    batch: int,
    inner: int,
    width: int,
    padding: int,
    threads: int,
) -> None:
    """With g = scale[t] de[m]: d_weight[t] += g, d_response_weight[t] += s[b] ⊙ g, t ≠ padding; d_s[b] += R[t] ⊙ g."""

def gated_epilogue_forward(
    y: int,
    q: int,
    h: int,
    weight_gate: int,
    bias: int,
    response_bias: int,
    bias_gate: int,
    outer: int,
    batch: int,
    inner: int,
    outputs: int,
    n: int,
    threads: int,
) -> None:
    """y ← y + bias + (h Gwᵀ) ⊙ q + (h Gbᵀ) ⊙ r, in place."""

def gated_epilogue_backward(
    dy: int,
    q: int,
    h: int,
    weight_gate: int,
    response_bias: int,
    bias_gate: int,
    g: int,
    d_weight_gate: int,
    d_bias: int,
    d_response_bias: int,
    d_bias_gate: int,
    d_h: int,
    outer: int,
    batch: int,
    inner: int,
    outputs: int,
    n: int,
    accumulate: bool,
    threads: int,
) -> None:
    """g = dy ⊙ (h Gwᵀ) and the wanted gradients of gates, biases and h, in one pass over dy and q."""

def gated_lstm_cell_forward(
    gates: int,
    p: int,
    q: int,
    scale: int,
    shift: int,
    c_before: int,
    c: int,
    h: int,
    response: int,
    p_row: int,
    q_row: int,
    batch: int,
    hidden: int,
    threads: int,
) -> None:
    """gates ← activated (gates + p + scale ⊙ q + shift) = i, f, g, o; c = f ⊙ c_before + i ⊙ g; h = o ⊙ tanh c."""

def gated_lstm_cell_backward(
    dy: int,
    dh: int,
    dc: int,
    gates: int,
    c: int,
    c_before: int,
    scale: int,
    d_gates: int,
    d_p: int,
    d_q: int,
    p_row: int,
    q_row: int,
    batch: int,
    hidden: int,
    threads: int,
) -> None:
    """d_gates, before the activations, d_both = [d_gates, d_gates ⊙ scale], and dc ← that of c_before."""

def lstm_cell_tangent(
    d_before: int,
    p: int,
    gates: int,
    c: int,
    c_before: int,
    dc: int,
    dh: int,
    batch: int,
    hidden: int,
    threads: int,
) -> None:
    """dh and dc, in place of that of c_before: the tangents of an LSTM's cell along d_before + p."""

def channel_epilogue_forward(
    p: int,
    q: int,
    scale: int,
    shift: int,
    y: int,
    q_copy: int,
    batch: int,
    groups: int,
    outputs: int,
    pixels: int,
    joined: bool,
    q_last: bool,
    y_last: bool,
    relu: bool,
    threads: int,
) -> None:
    """y = p + scale ⊙ q + shift over channels of images, and a copy of q; y may be p."""

def channel_epilogue_backward(
    dy: int,
    y: int,
    q: int,
    scale: int,
    d_p: int,
    d_q: int,
    d_scale: int,
    d_shift: int,
    batch: int,
    groups: int,
    outputs: int,
    pixels: int,
    joined: bool,
    q_last: bool,
    y_last: bool,
    threads: int,
) -> None:
    """d_p = g, d_q = g ⊙ scale and, over pixels, d_scale = Σ g ⊙ q and d_shift = Σ g; g = dy, given y dy ⊙ [y > 0]."""

def transpose(from_: int, to: int, batch: int, rows: int, columns: int, threads: int) -> None:
    """(batch, rows, columns) to (batch, columns, rows)."""
