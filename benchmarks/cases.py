"""The measured cases: operations × shapes × modes, and the providers of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import baselines, image_cases, sequence_cases
from benchmarks.baselines import Limit, Range
from benchmarks.gradients import compiled, differentiate
from benchmarks.timing import Provider

HYPERPARAMETERS = 15

# The fifteen of the CIFAR-10 network: seven dropouts, input dropout and scale, four colour jitters, cutout.
RANGES = (
    *[Range(0.0, 0.9)] * 7,
    Range(0.0, 0.95),
    Range(0.0, 0.3),
    Range(0.0, 0.5),
    *[Range(0.0, 1.0)] * 3,
    Range(0.0, 24.0, integer=True),
    Range(0.0, 4.0, integer=True),
)

# (B, I, O): a classifier's layer, many small rows, and the PTB LSTM's gates over 40 sequences of 70 words.
GATED_LINEAR_SHAPES = ((128, 1024, 1024), (4096, 256, 256), (2800, 650, 2600))
# On CUDA also one whose operands are several times an L2 cache of 50 MB: x, W, R and dy of 34 MB each in bfloat16.
LARGE_GATED_LINEAR_SHAPES = ((4096, 4096, 4096),)
PERTURB_BATCHES = (128, 4096)
# flat (B, F), per channel (B, C, H, W), locked over time (T, B, F)
DROPOUT_SHAPES: dict[str, tuple[int, ...]] = {
    "flat": (128, 4096),
    "channel": (128, 64, 16, 16),
    "locked": (70, 40, 650),
}
# On CUDA also one that exceeds the L2 cache: 134 MB in bfloat16.
LARGE_DROPOUT_SHAPE = (4096, 16384)
DROPOUT_DIMS: dict[str, tuple[int, tuple[int, ...]]] = {
    "flat": (0, ()),
    "channel": (0, (2, 3)),
    "locked": (1, (0,)),
}

# mode: (whether the forward is timed, which of x, W, b, R, r, Gw, Gb, h have their gradient timed)
GATED_LINEAR_MODES: dict[str, tuple[bool, tuple[bool, ...]]] = {
    "forward": (True, (False,) * 8),
    "train": (True, (True,) * 7 + (False,)),
    "full": (True, (True,) * 8),
    "valid": (True, (True,) + (False,) * 6 + (True,)),
    "full_backward": (False, (True,) * 8),
    "valid_backward": (False, (True,) + (False,) * 6 + (True,)),
}
PERTURB_MODES = ("forward", "full", "valid")
DROPOUT_MODES = ("forward", "full")


@dataclass(frozen=True)
class Case:
    """One computation to measure. ``compiled``: whether to include torch.compile, which takes long to warm up."""

    op: str
    mode: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    compiled: bool = True

    def providers(self) -> dict[str, Provider]:
        """The providers of this case, by name. Those named limit... are bounds rather than implementations."""
        torch.manual_seed(0)
        torch._dynamo.reset()
        if self.op == "gated_linear":
            return _gated_linear(self)
        if self.op == "gated_lstm":
            return sequence_cases.gated_lstm(self)
        if self.op == "perturb":
            return _perturb(self)
        if self.op == "augment":
            return image_cases.augment(self)
        if self.op.startswith("gated_conv2d"):
            return image_cases.gated_conv2d(self)
        return _dropout(self, self.op.removeprefix("dropout_"))

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


def all_cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """Every case of this device: float32 on the CPU, bfloat16 and float32 on CUDA.

    ``quick`` only tests that everything runs: small shapes, one dtype, nothing compiled.
    """
    on_cuda = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float32) if on_cuda and not quick else (torch.float32,)
    linear_shapes = GATED_LINEAR_SHAPES + (LARGE_GATED_LINEAR_SHAPES if on_cuda else ())
    dropout_shapes = [*DROPOUT_SHAPES.items()] + ([("flat", LARGE_DROPOUT_SHAPE)] if on_cuda else [])

    def cases(op: str, modes: Iterable[str], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Case]:
        for mode in modes:
            yield Case(op, mode, shape, dtype, device, not quick)

    for dtype in dtypes:
        for layer in ((32, 64, 48),) if quick else linear_shapes:
            yield from cases("gated_linear", GATED_LINEAR_MODES, layer, dtype)
        for sequence in ((3, 4, 16),) if quick else sequence_cases.gated_lstm_shapes(device):
            yield from cases("gated_lstm", sequence_cases.GATED_LSTM_MODES, sequence, dtype)
    for batch in PERTURB_BATCHES[:1] if quick else PERTURB_BATCHES:
        yield from cases("perturb", PERTURB_MODES, (batch, HYPERPARAMETERS), torch.float32)
    for dtype in dtypes:
        for kind, sizes in [*DROPOUT_SHAPES.items()] if quick else dropout_shapes:
            shape = tuple(min(size, 8) for size in sizes) if quick else sizes
            yield from cases(f"dropout_{kind}", DROPOUT_MODES, shape, dtype)
        for network, layers in image_cases.GATED_CONV2D_SHAPES.items():
            for convolution in ((4, 5, 9, 9, 6, 3, 2),) if quick else layers:
                yield from cases(f"gated_conv2d_{network}", image_cases.GATED_CONV2D_MODES, convolution, dtype)
    for shape in ((4, 3, 24, 20),) if quick else image_cases.augment_shapes(device):
        yield from cases("augment", ("forward",), shape, torch.float32)


def gated_linear_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """x, W, b, R, r, Gw, Gb, h with magnitudes as in a trained layer, and dy."""
    batch, inputs, outputs = case.shape
    n = HYPERPARAMETERS

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=case.device) * scale).to(case.dtype)

    width = inputs**-0.5
    x, h, dy = normal(batch, inputs), normal(batch, n), normal(batch, outputs)
    weight, response_weight = normal(outputs, inputs, scale=width), normal(outputs, inputs, scale=width)
    bias, response_bias = normal(outputs, scale=width), normal(outputs, scale=width)
    weight_gate, bias_gate = normal(outputs, n, scale=0.1), normal(outputs, n, scale=0.1)
    return [x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h], dy


def _gated_linear(case: Case) -> dict[str, Provider]:
    from stn_fast.functional import gated_linear

    inputs, dy = gated_linear_inputs(case)
    forward, wanted = GATED_LINEAR_MODES[case.mode]

    def provider(function: Callable[..., Tensor], wanted: Sequence[bool] = wanted) -> Provider:
        return differentiate(function, inputs, wanted, dy, forward)

    providers = {"stn_fast": provider(gated_linear), "eager": provider(baselines.gated_linear)}
    if case.compiled:
        epilogue = compiled(baselines.gated_epilogue)

        def concatenated(x: Tensor, w: Tensor, b: Tensor, rw: Tensor, rb: Tensor, *gates: Tensor) -> Tensor:
            y: Tensor = epilogue(torch.nn.functional.linear(x, torch.cat([w, rw])), b, rb, *gates)
            return y

        providers["compiled"] = provider(compiled(baselines.gated_linear))
        providers["concatenated"] = provider(concatenated)
    if case.mode == "valid_backward":
        _, everything = GATED_LINEAR_MODES["full_backward"]
        providers["stn_fast_full_backward"] = provider(gated_linear, everything)
    return providers | _gated_linear_limits(inputs, dy, forward, wanted)


def _gated_linear_limits(
    inputs: list[Tensor], dy: Tensor, forward: bool, wanted: Sequence[bool]
) -> dict[str, Provider]:
    from stn_fast.ops.products import library, times_transpose

    x, weight, _, response_weight, _, weight_gate, _, h = inputs
    limit = Limit.of(x, weight, response_weight, dy, dy * (h @ weight_gate.T))

    def one(_: None) -> object:
        products = limit.forward_one() if forward else ()
        return products + (limit.backward_one(weights=wanted[1]) if any(wanted) else ())

    def two(_: None) -> object:
        products = limit.forward_two() if forward else ()
        return products + (limit.backward_two(weights=wanted[1]) if any(wanted) else ())

    def onednn(_: None) -> object:
        products = [times_transpose(limit.x, limit.both_weights)] if forward else []
        products += [times_transpose(limit.both_dy, limit.both_weights.T)] if any(wanted) else []
        return products + ([limit.both_dy.T @ limit.x] if wanted[1] else [])

    providers = {"limit_one_product": Provider(one), "limit_two_products": Provider(two)}
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and library() == "oneDNN"
    return providers | ({"onednn_products": Provider(onednn)} if ours else {})


def _perturb(case: Case) -> dict[str, Provider]:
    from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace

    batch = case.shape[0]
    space = HyperparameterSpace(
        [
            Hyperparameter(f"h{k}", low=r.low, high=r.high, init=(r.high or 1.0) * 0.3, integer=r.integer)
            for k, r in enumerate(RANGES)
        ]
    )
    location, raw_scale = space.initial_state(device=case.device)
    center, step = location.clone(), torch.zeros((), dtype=torch.int64, device=case.device)

    def fused(location: Tensor, raw_scale: Tensor) -> tuple[Tensor, Tensor]:
        hyper = space.sample(location, raw_scale, batch_size=batch, seed=0, step=step)
        return hyper.values, hyper.response

    def eager(location: Tensor, raw_scale: Tensor) -> tuple[Tensor, Tensor]:
        return baselines.perturb(location, raw_scale, center, RANGES, batch)

    functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {"stn_fast": fused, "eager": eager}
    if case.compiled:
        functions["compiled"] = compiled(eager)

    # full: gradients from both outputs. valid: only from the response, as in a validation step.
    first = 1 if case.mode == "valid" else 0
    incoming = [torch.randn(batch, HYPERPARAMETERS, device=case.device) for _ in range(2)][first:]
    wanted = (case.mode != "forward",) * 2

    def provider(function: Callable[..., tuple[Tensor, ...]]) -> Provider:
        return differentiate(lambda *leaves: function(*leaves)[first:], (location, raw_scale), wanted, incoming)

    return {name: provider(function) for name, function in functions.items()}


def _dropout(case: Case, kind: str) -> dict[str, Provider]:
    from stn_fast.functional import dropout

    example_dim, shared_dims = DROPOUT_DIMS[kind]
    x = torch.randn(case.shape, device=case.device).to(case.dtype)
    dy = torch.randn_like(x)
    rate = torch.rand(case.shape[example_dim], device=case.device) * 0.8
    step = torch.zeros((), dtype=torch.int64, device=case.device)

    def fused(x: Tensor) -> Tensor:
        return dropout(x, rate, seed=0, step=step, stream=1, shared_dims=shared_dims, example_dim=example_dim)

    def eager(x: Tensor) -> Tensor:
        return baselines.dropout(x, rate, example_dim, shared_dims)

    functions: dict[str, Callable[[Tensor], Tensor]] = {"stn_fast": fused, "eager": eager}
    if case.compiled:
        functions["compiled"] = compiled(eager)
    wanted = (case.mode == "full",)
    providers = {name: differentiate(function, (x,), wanted, dy) for name, function in functions.items()}

    def scale_once(_: None) -> object:
        return (x * 2.0, dy * 2.0) if case.mode == "full" else x * 2.0

    return providers | {"limit_one_pass": Provider(scale_once)}
