"""Predicts the time of each target's case from its operations, bytes and launches, and the rates of a GPU.

    python -m benchmarks.cost_model
    python -m benchmarks.cost_model --measured build/gpu/machine.json --rows build/gpu

A launch takes the longest of the times for its operations, its bytes in memory and its bytes on the chip, and starts a
fixed gap after the previous one. Everything is bfloat16, except that weights and their updates are float32. Rates are
assumptions (see `H100`), or measured by `make gpu-report`.

Not modelled: operands that stay in the L2 cache between launches; waves of tiles that don't fill the device; padding of
a product of few examples to the 64 rows of the tensor cores; the arithmetic of random numbers and activations; the
host's time if nothing is captured; lower clocks under load. So absolute times are rough, and mostly too short. Ratios
are better, because both sides omit the same.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import plain
from benchmarks.aims import AIMS, CIFAR_BATCH, LARGE_LINEAR, LARGE_LSTM, LSTM, LSTM_LINEAR, PERTURBED, Rows, is_positive
from benchmarks.image_cases import GATED_CONV2D_SHAPES, HYPERPARAMETERS
from benchmarks.language_steps import LAYERS, SHAPES
from benchmarks.records import on_cuda, read_machine, read_rows
from benchmarks.whole_steps import TRAIN_STEPS, VALID_STEPS
from stn_fast.command_line import run_command

ITEM = 2  # bytes of a bfloat16 number
TILE, DEPTH = 128, 1024  # of a product's outputs, and of what one program sums at least


@dataclass(frozen=True)
class Machine:
    """What a GPU reaches. Operations count multiplications and additions; times are seconds.

    Args:
        operations: a second, of large products of bfloat16.
        bandwidth: bytes read and written a second.
        on_chip: bytes a second that all multiprocessors read from shared memory or the L2 cache.
        multiprocessors: products of fewer tiles use a share of the rate.
        launch: from the end of a kernel to the start of the next one in a CUDA graph.
        barrier: of all multiprocessors, between two time steps of a persistent kernel.
        issue: of the host, for an operation of eager PyTorch.
    """

    name: str
    operations: float
    bandwidth: float
    on_chip: float = 15e12
    multiprocessors: int = 132
    launch: float = 1.5e-6
    barrier: float = 1.5e-6
    issue: float = 5e-6

    def seconds(self, work: Sequence[Work]) -> float:
        """Of launches one after another."""
        return sum(self._one(launch) for launch in work)

    def _one(self, work: Work) -> float:
        share = min(1.0, work.tiles / self.multiprocessors)
        busy = max(
            work.operations / (self.operations * share), work.bytes / self.bandwidth, work.on_chip / self.on_chip
        )
        return work.repeats * ((self.barrier if work.persistent else self.launch) + busy)


# Published peaks: 989e12 operations a second of dense bfloat16, 3.35e12 bytes a second (H200: 4.8e12). Assumed to be
# reached: 0.65 of the first by large library products, 0.9 of the second by a copy, and on the chip half of what the
# shared memories deliver at 1.75 GHz (132 · 128 bytes a cycle). The other figures are assumptions of the right order.
H100 = Machine("H100 SXM, assumed rates", 0.65 * 989e12, 0.9 * 3.35e12)
H200 = replace(H100, name="H200, assumed rates", bandwidth=0.9 * 4.8e12)


def measured_machine(content: dict[str, Any]) -> Machine:
    """A machine with the rates in the file of `benchmarks.preflight`, and assumed ones where it has none."""
    rates = content.get("product_operations_per_second")
    found = {
        "operations": rates.get("bf16") if isinstance(rates, dict) else None,
        "bandwidth": content.get("copy_bytes_per_second"),
        "multiprocessors": content.get("multiprocessors"),
    }
    known = {key: value for key, value in found.items() if is_positive(value)}
    name = str(content.get("name", "unnamed GPU"))
    assumed = H200 if "H200" in name else H100
    kind = "measured rates" if {"operations", "bandwidth"} <= set(known) else "some assumed rates"
    return replace(assumed, name=f"{name}, {kind}", **known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Work:
    """One launch, or ``repeats`` of them that wait for each other. Operations are those of products alone.

    ``tiles`` is how many multiprocessors its products can use, ``on_chip`` bytes read again from shared memory or L2;
    with ``persistent``, the repeats are steps of one launch.
    """

    name: str
    operations: float = 0.0
    bytes: float = 0.0
    tiles: float = math.inf
    on_chip: float = 0.0
    repeats: int = 1
    persistent: bool = False


Plan = list[Work]


def operations(work: Plan) -> float:
    return sum(launch.repeats * launch.operations for launch in work)


def launches(work: Plan) -> int:
    return sum(1 if launch.persistent else launch.repeats for launch in work)


def product(name: str, rows: int, summed: int, columns: int, more_bytes: float = 0.0) -> Work:
    """(rows, summed) by (summed, columns), everything read and written once."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE) * max(1, summed // DEPTH)
    read_and_written = ITEM * (rows * summed + summed * columns + rows * columns)
    return Work(name, 2 * rows * summed * columns, read_and_written + more_bytes, tiles)


def one_pass(name: str, numbers: float, item: int = ITEM) -> Work:
    """An elementwise pass that reads and writes so many numbers in all."""
    return Work(name, bytes=item * numbers)


def linear(rows: int, inputs: int, outputs: int, branches: int, dx: bool = True, dw: bool = True) -> Plan:
    """The bare products of a layer with ``branches`` weights of (outputs, inputs): forward, then what is wanted."""
    wide = branches * outputs
    found = [product("x [W; R]ᵀ", rows, inputs, wide)]
    found += [product("[dy, g] [W; R]", rows, wide, inputs)] if dx else []
    return found + ([product("[dy, g]ᵀ x", wide, rows, inputs)] if dw else [])


def gated_linear(rows: int, inputs: int, outputs: int, dx: bool = True, dw: bool = True) -> Plan:
    """Of a training step: the first product leaves y and x Rᵀ, a pass over dy makes g = dy ⊙ s and sums for gates."""
    first, *others = linear(rows, inputs, outputs, 2, dx, dw)
    gates = [one_pass("g, sums for gates", 3 * rows * outputs), Work("gates' gradients")]
    return [first, *gates, *others]


def convolution(shape: Sequence[int], branches: int, dx: bool | None = None, dw: bool = True) -> Plan:
    """The bare convolutions on ``branches`` sets of filters; images of the data have no gradient."""
    batch, channels, height, width, outputs, kernel, stride = shape
    rows, wide = batch * (-(-height // stride)) * (-(-width // stride)), branches * outputs
    found = linear(rows, channels * kernel**2, wide, 1, channels != 3 if dx is None else dx, dw)
    # Images are read once, however many filters see a pixel.
    images, patches = batch * channels * height * width, rows * channels * kernel**2
    return [replace(work, bytes=work.bytes + ITEM * (images - patches)) for work in found]


def conv_gates(shape: Sequence[int]) -> Plan:
    """The gates of every example, scale and shift in float32; the gradients of all gates and biases; that of h.

    The pass over dy leaves the gradients of scale and shift in parts, which both backward kernels read.
    """
    from stn_fast.kernels.gated_conv2d_backward import PROGRAMS, tile_for
    from stn_fast.kernels.launch import split

    batch, _, height, width, outputs, _, stride = shape
    pixels, n = (-(-height // stride)) * (-(-width // stride)), HYPERPARAMETERS
    tile = tile_for(True, outputs, pixels).kwargs
    parts, _ = split(batch * -(-outputs // tile["BLOCK_O"]), -(-pixels // tile["BLOCK_P"]), PROGRAMS)
    tables = 2 * 4 * batch * outputs
    h, gate = ITEM * batch * n, ITEM * outputs * n
    return [
        Work("gates", bytes=h + 2 * gate + 2 * ITEM * outputs + tables),
        Work("gates' gradients", bytes=parts * tables + h + 3 * gate + 3 * ITEM * outputs),
        Work("dh", bytes=parts * tables + h + 2 * gate + ITEM * outputs),
    ]


def gated_convolution(shape: Sequence[int]) -> Plan:
    """Of a training step: gates of the examples, the convolution with its epilogue, and a pass over dy."""
    batch, channels, height, width, outputs, _, stride = shape
    numbers = batch * (-(-height // stride)) * (-(-width // stride)) * outputs
    first, *others = convolution(shape, 2)
    # Few channels leave the fused kernel's tiles empty: the library's convolution and an epilogue over [P, Q] instead.
    epilogue = [one_pass("epilogue", 3 * numbers)] if channels < 16 else []
    gates, *gradients = conv_gates(shape)
    return [gates, first, *epilogue, one_pass("[dy, g], sums for gates", 4 * numbers), *gradients, *others]


def lstm(steps: int, batch: int, hidden: int, branches: int, wide_weights: bool = True) -> Plan:
    """Forward and backward of a layer, its input as wide as its state; one persistent launch each way for the states.

    ``branches`` is 2 for the gated layer and 1 for the plain one. The weights of a step stay on the chip.
    ``wide_weights=False`` leaves the products for the weights' gradients out.
    """
    wide, rows = 4 * hidden, steps * batch
    both = branches * wide
    tiles = both / 32  # each multiprocessor owns some columns of all gates
    step = Work("a time step", 2 * batch * hidden * both, 0.0, tiles, ITEM * hidden * both, steps, persistent=True)
    saved = one_pass("saved gates, states, responses", rows * (wide * branches + 2 * hidden))
    found = [product("x [W; R]ᵀ", rows, hidden, both), step, saved]
    found += [replace(step, name="a time step backward"), saved]
    if branches == 2:
        found += [one_pass("g, sums for gates", 4 * rows * wide), Work("gates' gradients"), Work("gates")]
    found += [product("dx", rows, both, hidden)]
    return found + ([product("dW", both, rows, hidden)] * 2 if wide_weights else [])


def eager_lstm_operations(steps: int) -> int:
    """PyTorch operations of the eager loop, forward and backward: two gated layers and a cell at each time step."""
    gated, cell = 7, 14
    return steps * 3 * (2 * gated + 1 + cell)  # a backward pass has about two for each one


def update(parameters: float, momentum: bool) -> Plan:
    """Norm, clipping, optimizer, and the casts of a step in bfloat16: weights there and gradients back."""
    casts = [Work("casts", bytes=12 * parameters)]
    norm = [Work("norm", bytes=4 * parameters), Work("clipping", bytes=8 * parameters)]
    return casts + norm + [Work("optimizer", bytes=(20 if momentum else 12) * parameters)]


LINEAR_LAYERS = tuple(pairwise(plain.FULLY_CONNECTED))


def alexnet_parameters(branches: int) -> float:
    convolutions = (o * (i * 9 + 1) for i, o in pairwise(plain.CHANNELS))
    return branches * (sum(convolutions) + sum(o * (i + 1) for i, o in LINEAR_LAYERS))


def alexnet_layers(batch: int) -> list[tuple[int, ...]]:
    return [(batch, *shape[1:]) for shape in GATED_CONV2D_SHAPES["alexnet"]]


def between_layers(batch: int, backward: bool = True) -> Plan:
    """ReLU, pooling and dropout of the AlexNet: each reads and writes an activation, there and back."""
    sizes = [b * (-(-h // s)) * (-(-w // s)) * o for b, _, h, w, o, _, s in alexnet_layers(batch)]
    sizes += [batch * outputs for _, outputs in LINEAR_LAYERS[:-1]]
    return [one_pass("between layers", 2 * size) for size in sizes for _ in range(6 if backward else 2)]


def alexnet_step(batch: int, branches: int) -> Plan:
    """A training step of the AlexNet, plain (one branch) or self-tuning (two)."""
    found = between_layers(batch) + update(alexnet_parameters(branches), momentum=True)
    found += [Work("perturbation")] if branches == 2 else []
    for shape in alexnet_layers(batch):
        found += gated_convolution(shape) if branches == 2 else convolution(shape, 1)
    for inputs, outputs in LINEAR_LAYERS:
        found += gated_linear(batch, inputs, outputs) if branches == 2 else linear(batch, inputs, outputs, 1)
    return found


def alexnet_validation(batch: int) -> Plan:
    """Perturbed: both branches forward, and back to the first gates; no gradient of a weight."""
    found = [*between_layers(batch), Work("casts", bytes=6 * alexnet_parameters(2)), Work("perturbation")]
    for shape in alexnet_layers(batch):
        found += [conv_gates(shape)[0], *convolution(shape, 2, dw=False), Work("pass over dy")]
    for inputs, outputs in LINEAR_LAYERS:
        found += [*linear(batch, inputs, outputs, 2, dw=False), Work("pass over dy")]
    return found


def language_parameters(width: int, words: int, branches: int) -> float:
    lstm_layer = 8 * width * (width + 1)
    return branches * (words * width + LAYERS * lstm_layer) + words


def decoder(rows: int, width: int, words: int, dw: bool = True) -> Plan:
    """Product with the vocabulary, and cross entropy in float32 there and back."""
    logits = rows * words
    entropy = [one_pass("cross entropy", logits * numbers, 4) for numbers in (1.5, 2, 2, 1.5)]
    return linear(rows, width, words, 1, dw=dw) + entropy


def language_step(steps: int, batch: int, width: int, words: int, branches: int) -> Plan:
    """A training step of the language model, plain or self-tuning."""
    rows = steps * batch
    found = decoder(rows, width, words) + update(language_parameters(width, words, branches), momentum=False)
    found += [one_pass("embedding, dropouts", 2 * rows * width)] * (2 * branches + 4)
    found += [one_pass("masked recurrent weights", 6 * 4 * width**2)] * (LAYERS * (branches - 1))
    return found + LAYERS * lstm(steps, batch, width, branches)


def language_validation(steps: int, batch: int, width: int, words: int) -> Plan:
    """Unperturbed: weights are folded, so that layers are plain ones; gates need the gradients of folded weights."""
    rows = steps * batch
    found = [*decoder(rows, width, words, dw=False), Work("casts", bytes=6 * language_parameters(width, words, 2))]
    found += [one_pass("folding, there and back", 5 * 8 * width**2)] * LAYERS
    found += [one_pass("embedding", 2 * rows * width)] * 3
    return found + LAYERS * lstm(steps, batch, width, 1)


@dataclass(frozen=True)
class Prediction:
    """Seconds of ours and of what it is compared with, None where there is no other; and the aim's figure."""

    ours: float
    other: float | None
    figure: float


def against(ours: Plan, other: Plan) -> Callable[[Machine], Prediction]:
    def predict(machine: Machine) -> Prediction:
        times = machine.seconds(ours), machine.seconds(other)
        return Prediction(*times, times[0] / times[1])

    return predict


def over_layers(network: str) -> Callable[[Machine], Prediction]:
    def predict(machine: Machine) -> Prediction:
        shapes = GATED_CONV2D_SHAPES[network]
        ours, bare = (
            [machine.seconds(of(s)) for s in shapes] for of in (gated_convolution, lambda s: convolution(s, 2))
        )
        logs = [math.log(a / b) for a, b in zip(ours, bare, strict=True)]
        return Prediction(sum(ours), sum(bare), math.exp(sum(logs) / len(logs)))

    return predict


def faster_than_eager(shape: tuple[int, int, int]) -> Callable[[Machine], Prediction]:
    def predict(machine: Machine) -> Prediction:
        ours, eager = machine.seconds(lstm(*shape, 2)), machine.issue * eager_lstm_operations(shape[0])
        return Prediction(ours, eager, eager / ours)

    return predict


def alone(work: Plan, counted: bool) -> Callable[[Machine], Prediction]:
    """Microseconds, or launches."""
    return lambda machine: Prediction(
        machine.seconds(work), None, launches(work) if counted else 1e6 * machine.seconds(work)
    )


def cycle(train: Plan, valid: Plan, plain_step: Plan) -> Callable[[Machine], Prediction]:
    return against(TRAIN_STEPS * train + VALID_STEPS * valid, TRAIN_STEPS * plain_step)


AUGMENTED = [Work("augment", bytes=(1 + 4) * math.prod(CIFAR_BATCH))]
PERTURBATION = [Work("perturb", bytes=3 * 4 * math.prod(PERTURBED))]
PTB = SHAPES["ptb"]

PREDICTIONS: dict[str, Callable[[Machine], Prediction]] = {
    "linear 4096": against(gated_linear(*LARGE_LINEAR), linear(*LARGE_LINEAR, 2)),
    "linear 650": against(gated_linear(*LSTM_LINEAR), linear(*LSTM_LINEAR, 2)),
    "conv alexnet": over_layers("alexnet"),
    "conv resnet18": over_layers("resnet18"),
    "lstm 650": against(lstm(*LSTM, 2), lstm(*LSTM, 1)),
    "lstm 650 stretch": against(lstm(*LSTM, 2), lstm(*LSTM, 1)),
    "lstm 1150": against(lstm(*LARGE_LSTM, 2), lstm(*LARGE_LSTM, 1)),
    "eager 650": faster_than_eager(LSTM),
    "eager 1150": faster_than_eager(LARGE_LSTM),
    "augment": alone(AUGMENTED, counted=False),
    "augment launches": alone(AUGMENTED, counted=True),
    "perturb launches": alone(PERTURBATION, counted=True),
    "cycle alexnet": cycle(alexnet_step(128, 2), alexnet_validation(128), alexnet_step(128, 1)),
    "cycle lstm": cycle(language_step(*PTB, 2), language_validation(*PTB), language_step(*PTB, 1)),
}


def table(machine: Machine, rows: Rows) -> str:
    """A line for each aim: bound, predicted times and figure, and what was measured."""
    lines = [f"{machine.name}: {machine.operations / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e12:.2f} TB/s"]
    width = max(len(aim.what) for aim in AIMS)
    lines.append(f"{'':<{width}}{'aim':>9}{'ours µs':>10}{'other µs':>10}{'predicted':>11}{'measured':>10}")
    for aim in AIMS:
        it, figure = PREDICTIONS[aim.key](machine), aim.figure(rows)
        other = "-" if it.other is None else f"{1e6 * it.other:.0f}"
        measured = "-" if figure is None else f"{figure.value:.3g}"
        lines.append(
            f"{aim.what:<{width}}{aim.said:>9}{1e6 * it.ours:>10.0f}{other:>10}{it.figure:>11.3g}{measured:>10}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model", description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=Path, metavar="FILE", help="machine.json of make gpu-report, for its rates")
    parser.add_argument("--rows", type=Path, metavar="DIR", help="folder with rows of a GPU, for what was measured")
    options = parser.parse_args(arguments)
    machine = H100
    if options.measured:
        content = read_machine(options.measured)
        if not content:
            parser.error(f"--measured {options.measured}: no figures can be read there")
        machine = measured_machine(content)
    found, problems = read_rows(options.rows) if options.rows else ([], [])
    print(table(machine, Rows([row for row in found if on_cuda(row)])))
    print("\n".join(problems), end="\n" if problems else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
