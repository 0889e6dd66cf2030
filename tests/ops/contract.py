"""What the tests know of every gated operation: how to draw its operands, and how to call it and its definition.

`test_contract.py` runs each of OPERATIONS through the same tests; what is particular to one has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from stn_fast import random
from stn_fast.ops import gated_conv2d, gated_embedding, gated_linear, gated_lstm
from stn_fast.ops.gates import GatedParameters

Results = tuple[Tensor, ...]
LAST = torch.channels_last


class Problem(NamedTuple):
    """Operands that may have gradients, by name, and functions of them in this order.

    `results` names what these return, each with its dimension that counts examples. `call` is the public function and
    `definition` its reference; their last operand, h, may be (B, n) or (n,). `alone` takes the number of an example
    before the operands, and computes its results by torch's plain operation.
    """

    operands: dict[str, Tensor]
    results: dict[str, int]
    call: Callable[..., Results]
    definition: Callable[..., Results]
    alone: Callable[..., Results]

    def shared(self) -> Problem:
        """The same with one h (n,) for all examples, that of the first."""
        return self._replace(operands=self.operands | {"h": self.operands["h"][0]})


Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class GatedOperation:
    """A gated operation, as the contract sees it.

    Args:
        module: its folder in stn_fast.ops, which has an `_operation`.
        build: makes a `Problem` of ``draw(*shape, scale=1)``, a device, and sizes and options, which all have defaults.
        variants: sizes and options by name, which are tested on every backend and in every dtype.
        modes: those that are compiled, cast by autocast, registered.
        tiny: sizes at which derivatives are compared with finite differences.
        any_size: strategies of hypothesis for the C++ core.
        edges: sizes of 0 and 1, tested in float32: in 16 bits plain torch may round a single number well by chance.
        many: sizes and options at which the core uses several threads.
        by_core: what the core computes at such sizes, where no product of the library takes part.
        large: sizes at which products with the weights are nearly all of the arithmetic; None without such products.
        casts: whether autocast casts it.
        composed: whether other operations compute it where its response is of low rank.
    """

    module: ModuleType
    build: Callable[..., Problem]
    variants: Mapping[str, Mapping[str, Any]]
    modes: Mapping[str, Mapping[str, Any]]
    tiny: Mapping[str, Any]
    any_size: Mapping[str, st.SearchStrategy[Any]]
    edges: Mapping[str, Mapping[str, Any]]
    many: Mapping[str, Any]
    by_core: Sequence[str]
    large: Mapping[str, int] | None = None
    casts: bool = True
    composed: bool = False

    @property
    def registered(self) -> Mapping[str, Mapping[str, Any]]:
        """Those of the modes that reach its own registered operation."""
        return {name: changes for name, changes in self.modes.items() if not (self.composed and "rank" in changes)}

    @property
    def name(self) -> str:
        return self.module.__name__.rpartition(".")[2]

    def problem(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **changes: Any
    ) -> Problem:
        """Drawn in float64, so that every dtype rounds the same numbers."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        return self.build(draw, device, **changes)


Factors = tuple[Sequence[int], Sequence[int]]


def _parameters(
    draw: Draw, matrix: Sequence[int], n: int, bias: bool, scale: float = 1.0, factors: Factors | None = None
) -> dict[str, Tensor]:
    shapes = GatedParameters.shapes(matrix, matrix[0], n, factors)
    matrices = ("weight", "response_weight" if factors is None else "response_projection")
    drawn = {
        name: draw(*shape, scale=scale if name in matrices else 1.0)
        for name, shape in zip(GatedParameters._fields, shapes, strict=False)
    }
    return {name: tensor for name, tensor in drawn.items() if bias or "bias" not in name}


def _grouped(tensors: Sequence[Tensor]) -> GatedParameters:
    """All six or, of an operation without bias, W, R and Gw; then B of a response of low rank."""
    if len(tensors) >= 6:
        return GatedParameters(*tensors)
    weight, response_weight, weight_gate, *projection = tensors
    return GatedParameters(weight, None, response_weight, None, weight_gate, None, *projection)


def _called(
    parameters: GatedParameters, h: Tensor, operation: Callable[..., Tensor], *before: Tensor, **options: Any
) -> Results:
    """A public function of one layer, which takes the six one by one and B by name."""
    *six, projection = parameters
    return (operation(*before, *six, h, response_projection=projection, **options),)


def _rows(h: Tensor, batch: int) -> Tensor:
    """h for each example, given so or one for all."""
    return h.expand(batch, -1) if h.ndim == 1 else h


def _own_weights(parameters: GatedParameters, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """W + diag(Gw h) R and b + (Gb h) ⊙ r of one example, h (n,)."""
    weight, bias, response, response_bias, weight_gate, bias_gate, projection = parameters
    if projection is not None:
        groups = len(projection) // response.shape[1]
        of_groups = response.flatten(1).unflatten(0, (groups, -1)), projection.unflatten(0, (groups, -1))
        response = torch.einsum("gok,gk...->go...", *of_groups).flatten(0, 1)
    own = weight + torch.einsum("o,o...->o...", weight_gate @ h, response)
    return own, None if bias is None else bias + (bias_gate @ h) * response_bias


def _linear(
    draw: Draw, device: str, *, batch: int = 17, inputs: int = 19, outputs: int = 23, n: int = 3, outer: int = 1,
    inner: int = 1, bias: bool = True, rank: int | None = None,
) -> Problem:  # fmt: skip
    """x (outer, batch, inner, I)"""
    x = draw(outer, batch, inner, inputs)

    def call(x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        return _called(_grouped(parameters), h, gated_linear.gated_linear, x, example_dim=1)

    def definition(x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        y = gated_linear.reference(x.flatten(0, 2), _grouped(parameters), _rows(h, batch), outer, inner)
        return (y.view(outer, batch, inner, outputs),)

    def alone(b: int, x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        return (F.linear(x[:, b], *_own_weights(_grouped(parameters), h[b])),)

    factors = None if rank is None else ((outputs, rank), (rank, inputs))
    operands = {"x": x, **_parameters(draw, (outputs, inputs), n, bias, factors=factors), "h": draw(batch, n)}
    return Problem(operands, {"y": 1}, call, definition, alone)


def _conv2d(
    draw: Draw, device: str, *, batch: int = 3, inputs: int = 4, outputs: int = 10, size: tuple[int, int] = (7, 5),
    kernel: int = 3, n: int = 3, bias: bool = True, layout: torch.memory_format = torch.contiguous_format,
    groups: int = 1, rank: int | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """x (batch, groups·I, *size) in a layout"""
    options["groups"] = groups
    x = draw(batch, groups * inputs, *size).contiguous(memory_format=layout)

    def call(x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        return _called(_grouped(parameters), h, gated_conv2d.gated_conv2d, x, **options)

    def definition(x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        return (gated_conv2d.reference(x, _grouped(parameters), _rows(h, batch), **options),)

    def alone(b: int, x: Tensor, *rest: Tensor) -> Results:
        *parameters, h = rest
        plain = {name: value for name, value in options.items() if name != "relu"}
        y = F.conv2d(x[b : b + 1], *_own_weights(_grouped(parameters), h[b]), **plain)[0]
        return (y.relu() if options.get("relu") else y,)

    matrix = (groups * outputs, inputs, kernel, kernel)
    factors = None if rank is None else ((groups * outputs, rank, 1, 1), (groups * rank, *matrix[1:]))
    operands = {"x": x, **_parameters(draw, matrix, n, bias, factors=factors), "h": draw(batch, n)}
    return Problem(operands, {"y": 0}, call, definition, alone)


def _lstm(
    draw: Draw, device: str, *, steps: int = 3, batch: int = 7, inputs: int = 11, hidden: int = 13, n: int = 3,
    bias: bool = True, reverse: bool = False, rank: int | None = None,
) -> Problem:  # fmt: skip
    """x (T, batch, I)"""

    def of(function: Callable[..., Any]) -> Callable[..., Results]:
        def run(x: Tensor, h_0: Tensor, c_0: Tensor, *rest: Tensor) -> Results:
            *weights, h = rest
            sides = (_grouped(weights[: len(weights) // 2]), _grouped(weights[len(weights) // 2 :]))
            h = _rows(h, batch) if function is gated_lstm.reference else h
            y, state = function(x, h_0, c_0, *sides, h, reverse=reverse)
            return y, *state

        return run

    def alone(b: int, x: Tensor, h_0: Tensor, c_0: Tensor, *rest: Tensor) -> Results:
        *weights, h = rest
        sides = (weights[: len(weights) // 2], weights[len(weights) // 2 :])
        own = [_own_weights(_grouped(side), h[b]) for side in sides]
        x_b = x[:, b : b + 1].flip(0) if reverse else x[:, b : b + 1]
        y, h_n, c_n = plain_lstm(x_b, h_0[b : b + 1], c_0[b : b + 1], *zip(*own, strict=True))
        return (y.flip(0) if reverse else y)[:, 0], h_n[0], c_n[0]

    operands = {"x": draw(steps, batch, inputs), "h_0": draw(batch, hidden), "c_0": draw(batch, hidden)}
    for side, columns in (("from_input", inputs), ("from_hidden", hidden)):
        factors = None if rank is None else ((4 * hidden, rank), (rank, columns))
        drawn = _parameters(draw, (4 * hidden, columns), n, bias, max(columns, 1) ** -0.5, factors)
        operands |= {f"{side}.{name}": tensor for name, tensor in drawn.items()}
    operands["h"] = draw(batch, n)
    results = {"y": 1, "h_n": 0, "c_n": 0}
    return Problem(operands, results, of(gated_lstm.gated_lstm), of(gated_lstm.reference), alone)


def plain_lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Results:
    """torch's LSTM with these weights of input and hidden state: y, h_n, c_n."""
    module = torch.nn.LSTM(x.shape[2], h_0.shape[1], bias=biases[0] is not None, dtype=x.dtype)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    own = {name: value for name, value in zip(names, (*weights, *biases), strict=True) if value is not None}
    y, (h_n, c_n) = torch.func.functional_call(module, own, (x, (h_0[None], c_0[None])))
    return y, h_n[0], c_n[0]


DROPPED = dict(seed=2**40 + 3, step=4, stream=2)


def scale_of(words: int, rate: float) -> Tensor:
    """What embedding dropout multiplies the rows of a table with, drawn by NumPy."""
    uniform = torch.from_numpy(random.uniform(DROPPED["seed"], DROPPED["step"], DROPPED["stream"], 1, words))[0]
    return torch.where(uniform >= rate, 1 / (1 - rate), 0).to(torch.float64)


def _embedding(
    draw: Draw, device: str, *, words: int = 11, width: int = 37, n: int = 3, outer: int = 1, batch: int = 3,
    inner: int = 1, rate: float | None = None, padding: int | None = None, rank: int | None = None, **options: Any,
) -> Problem:  # fmt: skip
    """tokens (outer, batch, inner)"""
    tokens = torch.randint(max(words, 1), (outer, batch, inner), generator=torch.Generator().manual_seed(0)).to(device)
    scale = None if rate is None else scale_of(words, rate).to(device)
    if rate is not None:
        options |= dict(DROPPED, rate=torch.tensor([rate], device=device, dtype=torch.float32))

    def call(weight: Tensor, response_weight: Tensor, weight_gate: Tensor, *rest: Tensor) -> Results:
        *projection, h = rest
        options["response_projection"] = projection[0] if projection else None
        floats = weight, response_weight, weight_gate, h
        return (gated_embedding.gated_embedding(tokens, *floats, example_dim=1, padding_idx=padding, **options),)

    def definition(*floats: Tensor) -> Results:
        *tables, h = floats
        among = (outer, inner, -1 if padding is None else padding)
        e = gated_embedding.reference(tokens.flatten(), _grouped(tables), _rows(h, batch), scale, *among)
        return (e.view(outer, batch, inner, width),)

    def alone(b: int, weight: Tensor, response_weight: Tensor, weight_gate: Tensor, *rest: Tensor) -> Results:
        *projection, h = rest
        response = projection[0] @ response_weight.T if projection else response_weight
        own = weight + response @ torch.diag(weight_gate @ h[b])
        return (F.embedding(tokens[:, b], own if scale is None else own * scale[:, None].to(own.dtype)),)

    shapes = {"weight": (words, width), "response_weight": (words, width), "weight_gate": (width, n), "h": (batch, n)}
    if rank is not None:
        h = shapes.pop("h")
        shapes |= {"response_weight": (width, rank), "response_projection": (words, rank), "h": h}
    return Problem({name: draw(*shape) for name, shape in shapes.items()}, {"e": 1}, call, definition, alone)


def _up_to(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


OPERATIONS = (
    GatedOperation(
        gated_linear,
        _linear,
        variants={
            "rows": dict(),
            "rows without bias": dict(bias=False),
            "positions": dict(outer=3, inner=2),
            "positions without bias": dict(outer=3, inner=2, bias=False),
            "low rank": dict(rank=5),
            "low rank, positions without bias": dict(rank=17, outer=3, inner=2, bias=False),
        },
        modes={
            "positions": dict(outer=3, inner=2),
            "rows without bias": dict(bias=False),
            "low rank": dict(rank=5, outer=3, inner=2),
        },
        tiny=dict(batch=2, inputs=3, outputs=2, n=2),
        any_size=dict(
            batch=_up_to(70),
            inputs=_up_to(70),
            outputs=_up_to(70),
            n=_up_to(17),
            outer=_up_to(3),
            inner=_up_to(3),
            bias=st.booleans(),
            rank=st.sampled_from([None, 1, 6]),
            seed=st.integers(0, 9),
        ),
        edges={
            "no batch": dict(batch=0),
            "no batch, low rank": dict(batch=0, rank=2),
            "no positions": dict(outer=0),
            "no inputs": dict(inputs=0),
            "no outputs": dict(outputs=0),
            "one of each": dict(batch=1, inputs=1, outputs=1, n=1),
        },
        many=dict(batch=700, inputs=33, outputs=130, n=7),
        by_core=("d_bias", "d_response_bias", "d_bias_gate"),
        large=dict(batch=32, inputs=48, outputs=40, n=1),
    ),
    GatedOperation(
        gated_conv2d,
        _conv2d,
        variants={
            "padded": dict(padding=1),
            "padded, channels_last": dict(padding="same", layout=LAST),
            "without bias": dict(padding=1, bias=False),
            "groups, relu": dict(groups=2, inputs=2, outputs=5, relu=True),
            "groups, relu, without bias, channels_last": dict(
                groups=2, inputs=2, outputs=5, relu=True, bias=False, layout=LAST
            ),
            "strided, dilated": dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2), relu=True),
            "low rank": dict(rank=2, padding=1),
            "low rank, groups, relu, without bias, channels_last": dict(
                rank=2, groups=2, inputs=2, outputs=5, relu=True, bias=False, layout=LAST
            ),
            "low rank, strided, dilated": dict(rank=3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        },
        modes={
            "padded, channels_last": dict(padding="same", layout=LAST),
            "groups, relu": dict(groups=2, inputs=2, outputs=5, relu=True),
            "large image": dict(batch=2, size=(17, 16)),  # which goes to the library pixel by pixel
            "low rank, groups, relu": dict(rank=2, groups=2, inputs=2, outputs=5, relu=True),
            "low rank, large image": dict(rank=2, batch=2, size=(17, 16)),
        },
        tiny=dict(batch=2, inputs=2, outputs=2, size=(4, 3), n=2),
        any_size=dict(
            batch=_up_to(9),
            inputs=_up_to(19),
            outputs=_up_to(23),
            kernel=_up_to(5),
            size=st.tuples(_up_to(20), _up_to(20)),
            padding=st.just(2),
            groups=_up_to(3),
            n=_up_to(17),
            bias=st.booleans(),
            relu=st.booleans(),
            rank=st.sampled_from([None, 1, 3]),
            layout=st.sampled_from([torch.contiguous_format, LAST]),
            seed=st.integers(0, 9),
        ),
        edges={
            "no batch": dict(batch=0, padding=1),
            "no batch, low rank": dict(batch=0, padding=1, rank=2),
            "no hyperparameters": dict(n=0, padding=1),
            "one of each": dict(batch=1, inputs=1, outputs=1, size=(1, 1), kernel=1, n=1),
        },
        many=dict(batch=9, inputs=3, outputs=20, size=(40, 40)),
        by_core=("d_bias", "d_response_bias", "d_bias_gate"),
        large=dict(batch=4, inputs=8, outputs=16, size=(9, 9), n=1, padding=1),
    ),
    GatedOperation(
        gated_lstm,
        _lstm,
        variants={
            "forward": dict(steps=3, batch=17, inputs=19, hidden=23),
            "forward without bias": dict(steps=3, batch=17, inputs=19, hidden=23, bias=False),
            "reverse": dict(steps=3, batch=17, inputs=19, hidden=23, reverse=True),
            "reverse without bias": dict(steps=3, batch=17, inputs=19, hidden=23, reverse=True, bias=False),
            "many hyperparameters": dict(n=33),
            "low rank": dict(steps=3, batch=17, inputs=19, hidden=23, rank=4),
            "low rank, reverse without bias": dict(inputs=19, hidden=24, rank=8, reverse=True, bias=False),
        },
        modes={
            "reverse": dict(reverse=True),
            "forward without bias": dict(bias=False),
            "low rank": dict(rank=4),
        },
        # In the draw of seed 0, terms of the gradient of h_0 cancel, and errors are ten times those of other draws.
        tiny=dict(steps=2, batch=2, inputs=3, hidden=2, n=2, seed=4),
        any_size=dict(
            steps=_up_to(6),
            batch=_up_to(9),
            inputs=_up_to(40),
            n=_up_to(9),
            hidden=st.sampled_from([1, 2, 3, 7, 13, 16, 17, 31, 37]),
            bias=st.booleans(),
            reverse=st.booleans(),
            rank=st.sampled_from([None, 1, 5]),
            seed=st.integers(0, 9),
        ),
        edges={
            "no batch": dict(batch=0),
            "no inputs": dict(inputs=0),
            "no hyperparameters": dict(n=0),
            "one of each": dict(steps=1, batch=1, inputs=1, hidden=1, n=1),
        },
        many=dict(steps=3, batch=67, inputs=5, hidden=251, n=2),
        by_core=(),
        large=dict(steps=8, batch=32, inputs=48, hidden=40, n=1),
    ),
    GatedOperation(
        gated_embedding,
        _embedding,
        variants={
            "one position": dict(),
            "time first": dict(outer=5, padding=2),
            "batch first": dict(inner=4),
            "time first, words dropped": dict(outer=5, rate=0.4, padding=2),
            "positions around, words dropped": dict(outer=3, inner=2, rate=0.4),
            "many hyperparameters": dict(words=9, width=20, n=70, outer=3),
            "low rank": dict(rank=4),
            "low rank, time first, words dropped": dict(rank=4, outer=5, rate=0.4, padding=2),
        },
        modes={
            "time first, words dropped": dict(outer=5, rate=0.4, padding=2),
            "low rank, time first, words dropped": dict(rank=4, outer=5, rate=0.4, padding=2),
        },
        tiny=dict(words=5, width=3, n=2, padding=None),  # padding gets no gradient though it is looked up
        any_size=dict(
            words=_up_to(90),
            width=_up_to(130),
            n=_up_to(9),
            outer=_up_to(7),
            batch=_up_to(7),
            inner=_up_to(4),
            rate=st.sampled_from([None, 0.0, 0.5, 0.95]),
            rank=st.sampled_from([None, 1, 5]),
            padding=st.sampled_from([None, 0]),
        ),
        edges={
            "no positions": dict(outer=0),
            "no positions, low rank": dict(outer=0, rank=2),
            "no batch": dict(batch=0),
            "no batch, low rank": dict(batch=0, rank=2),
            "no width": dict(width=0),
            "one of each": dict(words=1, width=1, n=1, batch=1),
        },
        many=dict(words=300, width=130, n=7, outer=40, batch=9, rate=0.2),
        by_core=("e", "d_weight", "d_response_weight"),
        casts=False,
        composed=True,
    ),
)
LINEAR, CONV2D, LSTM, EMBEDDING = OPERATIONS
