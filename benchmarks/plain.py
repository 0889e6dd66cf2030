"""Plain training of the networks that the package tunes: torch.nn modules, fixed hyperparameters, the same optimizer.

Dropout uses the initial rates of the hyperparameters. The language model is limited to what torch.nn.LSTM offers: it
has no DropConnect, no dropout of whole words, and no penalty on activations. The self-tuning steps do this additional
work, so it is included in ratios to these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import CHANNELS, FULLY_CONNECTED, POOLED, STRIDES

RATE = 0.05


class Graphs(Protocol):
    """What makes CUDA graphs: `benchmarks.cuda_timing.Cuda`."""

    def warm(self, run: Callable[[], object]) -> None: ...

    def capture(
        self, prepare: Callable[[], Any], call: Callable[[Any], object], calls: int
    ) -> Callable[[], object]: ...


MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def alexnet() -> nn.Module:
    """Images (B, 3, 32, 32) to logits (B, 10): `stn_fast.models.alexnet` without its response, channels_last."""
    layers: list[nn.Module] = []
    for (inputs, outputs), stride, pooled in zip(pairwise(CHANNELS), STRIDES, POOLED, strict=True):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
        layers += [nn.Dropout2d(RATE)]
    layers += [nn.Flatten()]
    for inputs, outputs in pairwise(FULLY_CONNECTED):
        if outputs == FULLY_CONNECTED[-1]:
            layers += [nn.Linear(inputs, outputs)]
        else:
            layers += [nn.Dropout(RATE), nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class LanguageModel(nn.Module):
    """Embedding, torch.nn.LSTM and a decoder tied to the embedding; the state is carried in buffers, in place."""

    hidden: Tensor
    cell: Tensor

    def __init__(self, words: int, width: int, layers: int, batch: int):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.dropout = nn.Dropout(RATE)
        self.lstm = nn.LSTM(width, width, layers, dropout=RATE if layers > 1 else 0.0)
        self.decoder_bias = nn.Parameter(torch.zeros(words))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        for name in ("hidden", "cell"):
            self.register_buffer(name, torch.zeros(layers, batch, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (T, B) to logits (T, B, words)."""
        x = self.dropout(self.embedding(tokens))
        y, state = self.lstm(x, (self.hidden.clone(), self.cell.clone()))
        with torch.no_grad():
            for kept, new in zip((self.hidden, self.cell), state, strict=True):
                kept.copy_(new)
        return F.linear(self.dropout(y), self.embedding.weight, self.decoder_bias)


class Training:
    """Training steps on batches of a fixed shape. Nothing is read back, and all state is kept in place.

    Args:
        model: returns logits (..., classes) of its inputs.
        optimizer: makes the optimizer.
        clip: maximum Euclidean norm of the gradient.
        casting: makes the context of the forward pass, as for autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MakeOptimizer,
        clip: float,
        casting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ):
        self.model, self.clip, self.casting = model, clip, casting
        self.optimizer = optimizer(model.parameters())

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of this batch, whose gradient the weights have been moved along."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.casting():
            loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()

    def captured(self, graphs: Graphs, inputs: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`step` as a CUDA graph for batches like this one, which are copied to where the graph reads them."""
        static = inputs.clone(), targets.clone()
        loss = torch.zeros((), device=inputs.device)

        def step() -> object:
            return loss.copy_(self.step(*static))

        graphs.warm(step)
        replay = graphs.capture(lambda: None, lambda _: step(), 1)

        def copy_and_replay(inputs: Tensor, targets: Tensor) -> Tensor:
            static[0].copy_(inputs)
            static[1].copy_(targets)
            replay()
            return loss

        return copy_and_replay
