"""Gated linear layers on a GPU: y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r and its gradients.

Two ways to compute each pair of products, and the autotuner chooses: two library products with one fused pass beside
them ("library"), or one Triton kernel with the gates inside. One product alone is always the library's.

Kernels hold rows of up to MAX_N hyperparameters in registers, and refuse more.
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import TypeAlias

import torch
import triton
from torch import Tensor

from .autotune import Problem, tuner
from .gated_linear_epilogue import (
    EPILOGUE_CONFIG,
    FINISH_CONFIG,
    LOW_RANK_CONFIG,
    MAX_RANK,
    backward_config,
    gated_linear_epilogue_bwd_gates_kernel,
    gated_linear_epilogue_bwd_rows_kernel,
    gated_linear_epilogue_fwd_kernel,
    gated_linear_gates_finish_kernel,
)
from .gated_linear_matmul import gated_linear_bwd_dw_kernel, gated_linear_bwd_dx_kernel, gated_linear_fwd_kernel
from .gates import MAX_N, gate_tables, padded
from .launch import ceil_div, device_guard, refuse_float64, split
from .matmul import config_name, configs

LIBRARY = "library"
Choice: TypeAlias = str | triton.Config
Gradients: TypeAlias = tuple[Tensor | None, ...]

# Programs that a reduction is split into, at least, where there is that much to do: four for each multiprocessor of
# large devices. A constant, so that results don't depend on the device.
REDUCTION_PROGRAMS = 528


def _precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32, as torch's own products do; 16-bit ones are exact either way."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _Problem:
    """The sizes of one call and what follows from them, shared by every launch."""

    def __init__(self, x: Tensor, weight: Tensor, h: Tensor, inner: int) -> None:
        (self.M, self.I), self.O = x.shape, weight.shape[0]
        self.batch, self.n = h.shape
        self.inner = inner
        if max(self.M, self.I, self.O) > 2**31 - 1024:
            raise ValueError(f"gated_linear: row and column numbers are 32 bits wide; got x {tuple(x.shape)}")
        if self.n > MAX_N:
            raise ValueError(
                f"gated_linear: kernels hold at most {MAX_N} hyperparameters; got {self.n}: use plain PyTorch"
            )
        refuse_float64("gated_linear", x=x)
        self.aligned = self.I % 16 == 0 and self.O % 16 == 0
        self.precision, n_pad = _precision(x.dtype), padded(self.n)
        self.options: dict[str, object] = {"PRECISION": self.precision, "N_PAD": n_pad}
        self.pass_config = backward_config(x.dtype, n_pad)
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
        self.configs = {config_name(config): config for config in configs(x.dtype, self.aligned, capability)}
        self._kind = (x.dtype, self.options["PRECISION"], f"n{self.options['N_PAD']}")
        self._passes: dict[int, dict[str, object]] = {}

    def tuned(self, operation: str, *flags: str) -> Problem:
        """The autotuner's problem of an operation on these sizes."""
        return Problem((f"gated_linear {operation}", *self._kind, *flags), (self.M, self.I, self.O))

    def pass_options(self, config: triton.Config) -> dict[str, object]:
        """Keyword arguments of a pass over dy, P or Q."""
        found = self._passes.get(id(config))  # of a constant of a module; its hash takes longer than a launch
        if found is None:
            launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            found = self._passes[id(config)] = self.options | config.kwargs | launch
        return found

    def named(self, choice: Choice) -> str:
        """The name of a choice; a configuration of the caller's own is added to the list."""
        if isinstance(choice, triton.Config):
            self.configs[config_name(choice)] = choice
            return config_name(choice)
        if choice in (LIBRARY, *self.configs):
            return choice
        raise ValueError(f"config={choice!r} is none of {[LIBRARY, *self.configs]}")


def _matrix_options(
    problem: _Problem, config: triton.Config, rows: int, columns: int, summed: int
) -> tuple[tuple[int], dict[str, object]]:
    """Grid and keyword arguments of a matrix kernel."""
    meta = config.kwargs
    grid = (ceil_div(rows, meta["BLOCK_M"]) * ceil_div(columns, meta["BLOCK_N"]),)
    options = meta | {"PRECISION": problem.precision, "EVEN_K": summed % meta["BLOCK_K"] == 0}
    return grid, options | {"num_warps": config.num_warps, "num_stages": config.num_stages}


_problems: dict[tuple[object, ...], _Problem] = {}
MOST_PROBLEMS = 4096  # that are kept: texts of all lengths have as many


def _problem(x: Tensor, weight: Tensor, h: Tensor, inner: int, own: bool) -> _Problem:
    """The problem of these sizes, made once; anew for a configuration of the caller's `own`, which it will hold."""
    if own:
        return _Problem(x, weight, h, inner)
    key = (x.shape, len(weight), h.shape, inner, x.dtype, _precision(x.dtype), x.device)
    found = _problems.get(key)
    if found is None:
        if len(_problems) >= MOST_PROBLEMS:
            _problems.clear()
        found = _problems[key] = _Problem(x, weight, h, inner)
    return found


def _padded_rank(factor: Tensor | None) -> int:
    """Columns of A in a tile, as many as tl.dot takes; 0 where Q is there already."""
    return 0 if factor is None else max(16, triton.next_power_of_2(factor.shape[1]))


def _response(u: Tensor, response_weight: Tensor, projection: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(A, u) where the passes make Q of them, else (None, Q)."""
    on_tensor_cores = u.dtype != torch.float32 or _precision(u.dtype) == "tf32"
    if projection is not None and len(projection) <= MAX_RANK and on_tensor_cores:
        return response_weight, u
    return None, torch.mm(u, response_weight.T)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
    save_response: bool,
    config: Choice | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, q): x (outer·B·inner, I) of examples h (B, n), contiguous and of one dtype; q = x Rᵀ where it is to be saved.

    With a projection B the response is R = A B, response_weight is A, and u = x Bᵀ is saved in place of q. The library
    computes the products with W and B; the one with A is part of the fused pass where that fits (`_response`).

    config fixes "library", a configuration's name or a configuration; by default the autotuner chooses.
    """
    problem = _problem(x, weight, h, inner, isinstance(config, triton.Config))

    def library() -> tuple[Tensor, Tensor]:
        y, u = torch.mm(x, weight.T), x if projection is None else torch.mm(x, projection.T)
        factor, q = _response(u, response_weight, projection)
        config = EPILOGUE_CONFIG if factor is None else LOW_RANK_CONFIG
        tile = config.kwargs
        grid = (ceil_div(problem.M, tile["BLOCK_M"]) * ceil_div(problem.O, tile["BLOCK_N"]),)
        gated_linear_epilogue_fwd_kernel[grid](
            y, q, factor, h, weight_gate, bias, response_bias, bias_gate,
            problem.M, problem.O, problem.n, u.shape[1], problem.batch, inner,
            HAS_BIAS=bias is not None, K_PAD=_padded_rank(factor), **problem.pass_options(config),
        )  # fmt: skip
        return y, q if projection is None else u

    def fused(name: str) -> tuple[Tensor, Tensor | None]:
        y = x.new_empty(problem.M, problem.O)
        q = torch.empty_like(y) if save_response else None
        grid, options = _matrix_options(problem, problem.configs[name], problem.M, problem.O, problem.I)
        scale, shift = gate_tables(h, weight_gate, bias, response_bias, bias_gate, problem.precision, x.dtype)
        gated_linear_fwd_kernel[grid](
            x, weight, response_weight, scale, shift, y, q, problem.M, problem.I, problem.O, problem.batch, inner,
            HAS_SHIFT=shift is not None, STORE_Q=save_response, **options,
        )  # fmt: skip
        return y, q

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        return library() if name == LIBRARY else fused(name)

    with device_guard(x):
        if config is None and projection is not None:
            config = LIBRARY
        elif config is None:
            tuned = problem.tuned("forward", f"bias={bias is not None}", f"save={save_response}")
            config = tuner.choose(tuned, (LIBRARY, *problem.configs), run, LIBRARY, x.device)
        y, q = run(problem.named(config))
    return y, q if save_response else None


def gated_sum(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    inner: int,
) -> Tensor:
    """P + (h Gwᵀ) ⊙ Q + (h Gbᵀ) ⊙ r of P and Q (outer·B·inner, O) and h (B, n); no P is 0."""
    problem = _problem(q, weight_gate, h, inner, False)
    tile = EPILOGUE_CONFIG.kwargs
    grid = (ceil_div(problem.M, tile["BLOCK_M"]) * ceil_div(problem.O, tile["BLOCK_N"]),)
    with device_guard(q):
        y = torch.zeros_like(q) if p is None else p.clone()
        no_bias = None if response_bias is None else torch.zeros_like(response_bias)
        gated_linear_epilogue_fwd_kernel[grid](
            y, q, None, h, weight_gate, no_bias, response_bias, bias_gate,
            problem.M, problem.O, problem.n, 0, problem.batch, inner,
            HAS_BIAS=no_bias is not None, K_PAD=0, **problem.pass_options(EPILOGUE_CONFIG),
        )  # fmt: skip
    return y


def gated_sum_backward(
    dy: Tensor,
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    inner: int,
    wanted: Sequence[bool],
) -> Gradients:
    """(dq, dGw, dr, dGb, dh), None where `wanted`, in the same order, says so."""
    want_q, want_gw, want_rb, want_gb, want_h = wanted
    problem = _problem(q, weight_gate, h, inner, False)
    # Of the matrices, only g is asked for: it is the gradient of q.
    run = _Backward(dy, q, weight_gate, weight_gate, response_bias, weight_gate, bias_gate, h, q, problem)
    want_c = (want_rb or want_gb) and response_bias is not None
    d_response_bias = d_weight_gate = d_bias_gate = dh = None
    with device_guard(q):
        if want_gw or want_c:
            _, d_response_bias, d_weight_gate, d_bias_gate, dh = run.gates(want_q, want_gw, want_c, want_h)
        elif want_q or want_h:
            dh = run.rows(want_q, want_h)
    return run.g, d_weight_gate, d_response_bias if want_rb else None, d_bias_gate if want_gb else None, dh


class _Backward:
    """One backward pass: its inputs, and the gates s and g = dy ⊙ s once somebody has needed them."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        response_weight: Tensor,
        response_bias: Tensor | None,
        weight_gate: Tensor,
        bias_gate: Tensor | None,
        h: Tensor,
        q: Tensor | None,
        problem: _Problem,
        projection: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """With a factor, A, the passes make Q of it and of u, which q then is."""
        self.dy, self.x, self.weight, self.response_weight = dy, x, weight, response_weight
        self.projection, self.factor = projection, factor
        self.rank = 0 if projection is None else len(projection)
        self.response_bias, self.weight_gate, self.bias_gate = response_bias, weight_gate, bias_gate
        self.h, self.q, self.problem = h, q, problem
        self.s: Tensor | None = None
        self.g: Tensor | None = None
        self.d_u: Tensor | None = None

    def dx(self, name: str) -> Tensor:
        problem = self.problem
        if self.projection is not None:
            return torch.mm(self.dy, self.weight).addmm_(self.du(), self.projection)
        if name == LIBRARY or not problem.O:  # kernels assume that there is something to sum
            return torch.mm(self.dy, self.weight).addmm_(self.gated_dy(), self.response_weight)
        dx = torch.empty_like(self.x)
        grid, options = _matrix_options(problem, problem.configs[name], problem.M, problem.I, problem.O)
        gated_linear_bwd_dx_kernel[grid](
            self.dy, self.weight, self.response_weight, self.scale(), dx,
            problem.M, problem.I, problem.O, problem.batch, problem.inner, **options,
        )  # fmt: skip
        return dx

    def dw(self, name: str) -> tuple[Tensor, Tensor]:
        problem = self.problem
        if name == LIBRARY or not problem.M:
            return torch.mm(self.dy.T, self.x), torch.mm(self.gated_dy().T, self.x)
        d_weight, d_response_weight = torch.empty_like(self.weight), torch.empty_like(self.weight)
        grid, options = _matrix_options(problem, problem.configs[name], problem.O, problem.I, problem.M)
        gated_linear_bwd_dw_kernel[grid](
            self.dy, self.x, self.scale(), d_weight, d_response_weight,
            problem.M, problem.I, problem.O, problem.batch, problem.inner, **options,
        )  # fmt: skip
        return d_weight, d_response_weight

    def scale(self) -> Tensor:
        if self.s is None:
            self.s, _ = gate_tables(self.h, self.weight_gate, None, None, None, self.problem.precision, self.dy.dtype)
        return self.s

    @property
    def _pass_config(self) -> triton.Config:
        problem = self.problem
        if self.factor is None:
            return problem.pass_config
        return backward_config(self.dy.dtype, padded(problem.n), _padded_rank(self.factor))

    def du(self) -> Tensor:
        """The gradient of u, with a projection."""
        if self.d_u is None:
            self.d_u = torch.mm(self.gated_dy(), self.response_weight)
        return self.d_u

    def gated_dy(self) -> Tensor:
        if self.g is None:
            self.rows(want_g=True, want_h=False)
        assert self.g is not None
        return self.g

    def rows(self, want_g: bool, want_h: bool) -> Tensor | None:
        """One pass that leaves g behind, returns dh, or both."""
        problem, config = self.problem, self._pass_config
        tile = config.kwargs
        row_tiles = ceil_div(problem.M, tile["BLOCK_M"])
        splits, each = split(row_tiles, ceil_div(problem.O, tile["BLOCK_N"]), REDUCTION_PROGRAMS)
        if want_g:
            self.g = torch.empty_like(self.dy)
        partial_dh = None
        if want_h:
            partial_dh = self.dy.new_empty(splits, problem.M, problem.n, dtype=torch.float32)
        gated_linear_epilogue_bwd_rows_kernel[(row_tiles, splits)](
            self.dy, self.q, self.factor, self.h, self.weight_gate, self.response_bias, self.bias_gate,
            self.g, partial_dh,
            problem.M, problem.O, problem.n, self.rank, problem.batch, problem.inner, each,
            K_PAD=_padded_rank(self.factor), HAS_BIAS=self.response_bias is not None, STORE_G=want_g, WANT_H=want_h,
            **problem.pass_options(config),
        )  # fmt: skip
        return self._dh(partial_dh)

    def _dh(self, partial_dh: Tensor | None) -> Tensor | None:
        """Adds partial sums of every row, (splits, M, n), over splits and positions."""
        if partial_dh is None:
            return None
        if not partial_dh.numel():
            return torch.zeros_like(self.h)
        batch, inner, n = self.problem.batch, self.problem.inner, self.problem.n
        return partial_dh.view(-1, batch, inner, n).sum((0, 2)).to(self.h.dtype)

    def gates(self, want_g: bool, want_s: bool, want_c: bool, want_h: bool) -> Gradients:
        """(db, dr, dGw, dGb, dh) as far as wanted: `want_s` dGw, `want_c` db, dr, dGb. Leaves g behind if wanted."""
        problem, config = self.problem, self._pass_config
        tile = config.kwargs
        output_tiles = ceil_div(problem.O, tile["BLOCK_N"])
        splits, each = split(output_tiles, ceil_div(problem.M, tile["BLOCK_M"]), REDUCTION_PROGRAMS)
        if want_g:
            self.g = torch.empty_like(self.dy)
        new = partial(self.dy.new_empty, dtype=torch.float32)
        s_partial = new(splits, problem.O, problem.n) if want_s else None
        c_partial = new(splits, problem.O, problem.n) if want_c else None
        bias_partial = new(splits, problem.O) if want_c else None
        partial_dh = new(output_tiles, problem.M, problem.n) if want_h else None
        gated_linear_epilogue_bwd_gates_kernel[(output_tiles, splits)](
            self.dy, self.q, self.factor, self.h, self.weight_gate, self.response_bias, self.bias_gate, self.g,
            s_partial, c_partial, bias_partial, partial_dh,
            problem.M, problem.O, problem.n, self.rank, problem.batch, problem.inner, each,
            K_PAD=_padded_rank(self.factor), HAS_BIAS=self.response_bias is not None,
            STORE_G=want_g, WANT_S=want_s, WANT_C=want_c, WANT_H=want_h,
            **problem.pass_options(config),
        )  # fmt: skip
        d_weight_gate = torch.empty_like(self.weight_gate) if want_s else None
        d_bias = self.dy.new_empty(problem.O) if want_c else None
        d_response_bias = torch.empty_like(d_bias) if d_bias is not None else None
        d_bias_gate = torch.empty_like(self.weight_gate) if want_c else None
        finish = FINISH_CONFIG
        gated_linear_gates_finish_kernel[(ceil_div(problem.O, finish.kwargs["BLOCK_N"]),)](
            s_partial, c_partial, bias_partial, self.response_bias, self.bias_gate,
            d_weight_gate, d_bias, d_response_bias, d_bias_gate, problem.O, problem.n, splits,
            WANT_S=want_s, WANT_C=want_c, N_PAD=problem.options["N_PAD"],
            num_warps=finish.num_warps, num_stages=finish.num_stages, **finish.kwargs,
        )  # fmt: skip
        return d_bias, d_response_bias, d_weight_gate, d_bias_gate, self._dh(partial_dh)


def _choose(run: _Backward, pair_x: bool, pair_w: bool, pass_is_needed: bool) -> tuple[str, str]:
    """How to compute dx, and dW with dR. First the best Triton kernel of each, then the ways to combine them."""
    problem, device = run.problem, run.dy.device

    def best(operation: str) -> str:
        def compute(name: str) -> object:
            return getattr(copy(run), operation)(name)

        smallest = list(problem.configs)[-1]  # fits wherever another does
        return tuner.choose(problem.tuned(operation), list(problem.configs), compute, smallest, device)

    names_x = [LIBRARY, best("dx")] if pair_x else [LIBRARY]
    names_w = [LIBRARY, best("dw")] if pair_w else [LIBRARY]

    def both(names: str) -> None:
        # A copy: what a trial leaves in it, or left when it failed, is nobody's result.
        trial, (name_x, name_w) = copy(run), names.split("+")
        # g costs little where a pass over dy is made anyway; then it isn't held against the library.
        trial.g = torch.empty_like(run.dy) if pass_is_needed else None
        if pair_x:
            trial.dx(name_x)
        if pair_w:
            trial.dw(name_w)

    ways = [f"{name_x}+{name_w}" for name_x in names_x for name_w in names_w]
    tuned = problem.tuned("backward", f"x={pair_x}", f"w={pair_w}", f"pass={pass_is_needed}")
    name_x, name_w = tuner.choose(tuned, ways, both, f"{LIBRARY}+{LIBRARY}", device).split("+")
    return name_x, name_w


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    response_bias: Tensor | None,
    weight_gate: Tensor,
    bias_gate: Tensor | None,
    h: Tensor,
    q: Tensor | None,
    outer: int,
    inner: int,
    wanted: Sequence[bool],
    config: Choice | tuple[Choice, Choice] | None = None,
    projection: Tensor | None = None,
) -> Gradients:
    """(dx, dW, db, dR, dr, dGw, dGb, dB, dh), None where `wanted`, in the same order, says so; q as `forward` saves it.

    q is needed for dGw and dh. With a projection B it is u, which dA needs too, and dA is in the place of dR.

    config fixes how dx, and how dW with dR, are computed, as in `forward`; a pair fixes each.
    """
    want_x, want_w, want_b, want_r, want_rb, want_gw, want_gb, want_p, want_h = wanted
    pair = config if isinstance(config, tuple) else (config or LIBRARY, config or LIBRARY)
    problem = _problem(x, weight, h, inner, any(isinstance(choice, triton.Config) for choice in pair))
    name_x, name_w = (problem.named(choice) for choice in pair)
    u, factor = q, None
    if projection is not None:
        factor, q = _response(q, response_weight, projection) if q is not None and (want_gw or want_h) else (None, None)
    run = _Backward(
        dy, x, weight, response_weight, response_bias, weight_gate, bias_gate, h, q, problem, projection, factor
    )
    pair_w = want_w and want_r and projection is None
    want_c = want_b or want_rb or want_gb
    needs_gates = want_gw or want_c
    with device_guard(x):
        if config is None and projection is None and (want_x or pair_w):
            name_x, name_w = _choose(run, want_x, pair_w, needs_gates or want_h)
        needs_g = (want_x and name_x == LIBRARY) or (want_r and (name_w == LIBRARY or not pair_w)) or want_p

        d_bias = d_response_bias = d_weight_gate = d_bias_gate = dh = None
        if needs_gates:
            d_bias, d_response_bias, d_weight_gate, d_bias_gate, dh = run.gates(needs_g, want_gw, want_c, want_h)
        elif want_h or needs_g:
            dh = run.rows(needs_g, want_h)
        dx = run.dx(name_x) if want_x else None
        d_weight = d_response_weight = None
        if pair_w:
            d_weight, d_response_weight = run.dw(name_w)
        else:
            if want_w:
                d_weight = torch.mm(dy.T, x)
            if want_r:
                source = x if projection is None else u
                assert source is not None
                d_response_weight = torch.mm(run.gated_dy().T, source)
        d_projection = torch.mm(run.du().T, x) if want_p else None
    return (
        dx,
        d_weight,
        d_bias if want_b else None,
        d_response_weight,
        d_response_bias if want_rb else None,
        d_weight_gate,
        d_bias_gate if want_gb else None,
        d_projection,
        dh,
    )
