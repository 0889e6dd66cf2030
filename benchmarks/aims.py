"""Target speeds on one H100 or H200 in bfloat16, and how to compute each figure from recorded rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from benchmarks.image_cases import GATED_CONV2D_SHAPES
from benchmarks.language_steps import SHAPES as LANGUAGE_SHAPES

Row = dict[str, Any]

LARGE_LINEAR, LSTM_LINEAR = (4096, 4096, 4096), (2800, 650, 2600)
LSTM, LARGE_LSTM = (70, 40, 650), (70, 80, 1150)
CIFAR_BATCH, PERTURBED = (128, 3, 32, 32), (128, 15)


class Rows:
    """The recorded rows of one device."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def find(
        self, op: str, mode: str, shape: Sequence[int], provider: str, key: str, dtype: str = "bfloat16"
    ) -> Row | None:
        """The last row of a case and provider in which ``key`` is a positive number."""
        wanted = {"op": op, "mode": mode, "shape": list(shape), "provider": provider, "dtype": dtype}
        for row in reversed(self.rows):
            if all(row.get(name) == value for name, value in wanted.items()) and is_positive(row.get(key)):
                return row
        return None


@dataclass(frozen=True)
class Figure:
    """What was measured; ``note`` says which of the rows were not timed as graphs."""

    value: float
    note: str = ""


@dataclass(frozen=True)
class Aim:
    """A figure and its bound, a most or a least. ``figure`` returns None where a row is missing."""

    key: str
    what: str
    bound: float
    figure: Callable[[Rows], Figure | None]
    least: bool = False
    unit: str = "×"

    @property
    def said(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound:g} {self.unit}".strip()

    def met(self, figure: Figure) -> bool:
        return figure.value >= self.bound if self.least else figure.value <= self.bound


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def note_of(*rows: Row | None) -> str:
    eager = [str(row["provider"]) for row in rows if row is not None and row.get("captured") is False]
    bound = [str(row["provider"]) for row in rows if row is not None and row.get("host_bound")]
    notes = [f"not captured: {', '.join(eager)}"] if eager else []
    return "; ".join(notes + ([f"host's time: {', '.join(bound)}"] if bound else []))


def value_of(
    op: str, mode: str, shape: Sequence[int], key: str, provider: str = "stn_fast", dtype: str = "bfloat16"
) -> Callable[[Rows], Figure | None]:
    """The number ``key`` of one row."""

    def figure(rows: Rows) -> Figure | None:
        row = rows.find(op, mode, shape, provider, key, dtype)
        return None if row is None else Figure(row[key], "" if key == "launches" else note_of(row))

    return figure


def mean_over_layers(network: str) -> Callable[[Rows], Figure | None]:
    """The geometric mean over all convolutions of a network; none is left out."""

    def figure(rows: Rows) -> Figure | None:
        op = f"gated_conv2d_{network}"
        found = [rows.find(op, "train", shape, "stn_fast", "ratio_to_limit") for shape in GATED_CONV2D_SHAPES[network]]
        ratios = [row["ratio_to_limit"] for row in found if row is not None]
        return Figure(geometric_mean(ratios), note_of(*found)) if len(ratios) == len(found) else None

    return figure


def times_faster_than_eager(shape: Sequence[int]) -> Callable[[Rows], Figure | None]:
    """As one waits for them in a program: of each, the longer of the device's time and the host's."""

    def figure(rows: Rows) -> Figure | None:
        ours, eager = (rows.find("gated_lstm", "train", shape, name, "p50") for name in ("stn_fast", "eager"))
        if ours is None or eager is None:
            return None
        hosts = [row["host_us"] if is_positive(row.get("host_us")) else 0.0 for row in (eager, ours)]
        waited = [max(row["p50"], host) for row, host in zip((eager, ours), hosts, strict=True)]
        return Figure(waited[0] / waited[1])

    return figure


def cycle(op: str, shape: Sequence[int]) -> Callable[[Rows], Figure | None]:
    return value_of(op, "cycle", shape, "ratio_to_plain", "stn_fast_captured")


AIMS = (
    Aim(
        "linear 4096", f"gated linear {LARGE_LINEAR}, forward and backward, to the bare products", 1.05,
        value_of("gated_linear", "train", LARGE_LINEAR, "ratio_to_limit"),
    ),
    Aim(
        "linear 650", f"gated linear {LSTM_LINEAR}, forward and backward, to the bare products", 1.25,
        value_of("gated_linear", "train", LSTM_LINEAR, "ratio_to_limit"),
    ),
    Aim("conv alexnet", "gated convolutions of AlexNet, to one bare convolution", 1.15, mean_over_layers("alexnet")),
    Aim("conv resnet18", "gated convolutions of ResNet-18, likewise", 1.15, mean_over_layers("resnet18")),
    Aim(
        "lstm 650", f"gated LSTM {LSTM}, forward and backward, to the plain LSTM of cuDNN", 1.5,
        value_of("gated_lstm", "train", LSTM, "ratio_to_plain"),
    ),
    Aim(
        "lstm 650 stretch", f"gated LSTM {LSTM}, the same, at best", 1.0,
        value_of("gated_lstm", "train", LSTM, "ratio_to_plain"),
    ),
    Aim(
        "lstm 1150", f"gated LSTM {LARGE_LSTM}, to the plain LSTM of cuDNN", 1.5,
        value_of("gated_lstm", "train", LARGE_LSTM, "ratio_to_plain"),
    ),
    Aim("eager 650", f"gated LSTM {LSTM}, times faster than the eager loop", 10, times_faster_than_eager(LSTM), True),
    Aim(
        "eager 1150", f"gated LSTM {LARGE_LSTM}, times faster than the eager loop", 10,
        times_faster_than_eager(LARGE_LSTM), True,
    ),
    Aim(
        "augment", "augmentation of 128 CIFAR images", 15,
        value_of("augment", "forward", CIFAR_BATCH, "p50", dtype="float32"), unit="µs",
    ),
    Aim(
        "augment launches", "augmentation of 128 CIFAR images, launches", 1,
        value_of("augment", "forward", CIFAR_BATCH, "launches", dtype="float32"), unit="",
    ),
    Aim(
        "perturb launches", "perturbation of 15 hyperparameters, launches", 1,
        value_of("perturb", "forward", PERTURBED, "launches", dtype="float32"), unit="",
    ),
    Aim(
        "cycle alexnet", "AlexNet, 2:1 cycle to two plain training steps, captured", 2.2,
        cycle("alexnet_step", CIFAR_BATCH),
    ),
    Aim(
        "cycle lstm", "LSTM language model, 2:1 cycle to two plain training steps, captured", 1.6,
        cycle("language_step", LANGUAGE_SHAPES["ptb"]),
    ),
)  # fmt: skip
