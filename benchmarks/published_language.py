"""Steps of a self-tuning LSTM language model as in the paper's code, in eager torch.

A Python loop over time computes six products per time step and layer: two branches from the input, two from the
previous state, and the gates of each. Gradients of all parameters are computed even if the step does not use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.baselines import Range
from benchmarks.published import Casting, Gated

State = tuple[Tensor, Tensor]


def gated_linear(x: Tensor, layer: Gated, h: Tensor, masked: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Two branches, and one product for both gates; `masked` are weights of both branches to take for the layer's."""
    weight, response_weight = (layer.weight, layer.response_weight) if masked is None else masked
    of_weight, of_bias = F.linear(h, torch.cat([layer.weight_gate, layer.bias_gate])).chunk(2, dim=1)
    response = of_weight * F.linear(x, response_weight) + of_bias * layer.response_bias
    return F.linear(x, weight, layer.bias) + response


class Layer(nn.Module):
    """One layer of the LSTM, one time step after another."""

    def __init__(self, inputs: int, hidden: int, n: int):
        super().__init__()
        self.from_input, self.from_hidden = Gated(4 * hidden, (inputs,), n), Gated(4 * hidden, (hidden,), n)

    def forward(self, x: Tensor, h: Tensor, state: State, rate: Tensor | None) -> tuple[Tensor, State]:
        """(T, B, I) → (T, B, H), and the state after; `rate` of DropConnect from hidden to hidden, one mask a call."""
        masked = None
        if rate is not None:
            keep = (torch.rand_like(self.from_hidden.weight) >= rate) / (1 - rate)
            masked = self.from_hidden.weight * keep, self.from_hidden.response_weight * keep
        (hidden, cell), outputs = state, []
        for x_t in x:
            before = gated_linear(x_t, self.from_input, h) + gated_linear(hidden, self.from_hidden, h, masked)
            i, f, g, o = before.chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)


class LanguageModel(nn.Module):
    """Embedding, LSTM, decoder tied to the embedding."""

    def __init__(self, words: int, width: int, layers: int, n: int):
        super().__init__()
        self.weight, self.response_weight = (nn.Parameter(torch.empty(words, width).uniform_(-0.1, 0.1)) for _ in "ER")
        self.weight_gate = nn.Parameter(0.01 * torch.randn(width, n))
        self.layers = nn.ModuleList(Layer(width, width, n) for _ in range(layers))
        self.decoder_bias = nn.Parameter(torch.zeros(words))

    def forward(
        self, tokens: Tensor, h: Tensor, rates: Mapping[str, Tensor] | None, states: Sequence[State]
    ) -> tuple[Tensor, list[State], Tensor, Tensor]:
        """(T, B) → logits (T, B, words), states, h of the last layer and the same after dropout.

        `rates` (B,) by name, None in a validation step.
        """
        tables: tuple[Tensor, Tensor] = self.weight, self.response_weight
        if rates is not None:
            rate = rates["embedding_dropout"][0]
            keep = (torch.rand(len(self.weight), 1, device=rate.device) >= rate) / (1 - rate)
            tables = tables[0] * keep, tables[1] * keep
        table, response = tables
        x = F.embedding(tokens, table) + F.linear(h, self.weight_gate) * F.embedding(tokens, response)
        x = x if rates is None else baselines.dropout(x, rates["input_dropout"], 1, (0,))
        after = []
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if number and rates is not None:
                x = baselines.dropout(x, rates["hidden_dropout"], 1, (0,))
            x, state = layer(x, h, state, None if rates is None else rates["recurrent_dropout"][0])
            after.append(state)
        dropped = x if rates is None else baselines.dropout(x, rates["output_dropout"], 1, (0,))
        return F.linear(dropped, self.weight, self.decoder_bias), after, x, dropped


class Trainer:
    """The published pair of steps on `LanguageModel`; states are carried from window to window.

    Args:
        names, ranges: the hyperparameters, in the order of their columns.
        shared: which of them have one draw for a batch.
        location, raw_scale: (n,), where they start; the scale is held.
        batch: streams read side by side.
    """

    def __init__(
        self,
        names: Sequence[str],
        ranges: Sequence[Range],
        shared: Sequence[bool],
        location: Tensor,
        raw_scale: Tensor,
        *,
        words: int,
        width: int,
        layers: int,
        batch: int,
    ):
        self.names, self.ranges, self.center = tuple(names), tuple(ranges), location.clone()
        device = location.device
        self.shared = torch.tensor(list(shared), device=device)
        self.location, self.raw_scale = location.clone().requires_grad_(), raw_scale.clone()
        self.model = LanguageModel(words, width, layers, len(self.names)).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.hyper_optimizer = torch.optim.Adam([self.location], lr=1e-2)
        zeros = torch.zeros(batch, width, device=device)
        self.states = {mode: [(zeros, zeros)] * layers for mode in ("train", "valid")}

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None) -> Tensor:
        for tensor in (*self.model.parameters(), self.location):
            tensor.grad = None
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        optimizer.step()
        return loss.detach()

    def _loss(
        self, mode: str, tokens: Tensor, targets: Tensor, h: Tensor, values: Tensor | None, casting: Casting
    ) -> Tensor:
        with casting():
            return self._loss_of_window(mode, tokens, targets, h, values)

    def _loss_of_window(self, mode: str, tokens: Tensor, targets: Tensor, h: Tensor, values: Tensor | None) -> Tensor:
        rates = None if values is None else dict(zip(self.names, values.unbind(1), strict=True))
        logits, states, raw, dropped = self.model(tokens, h, rates, self.states[mode])
        self.states[mode] = [(hidden.detach(), cell.detach()) for hidden, cell in states]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if rates is not None:
            loss = loss + rates["activation_regularization"][0] * dropped.square().mean()
            loss = loss + rates["temporal_activation_regularization"][0] * (raw[1:] - raw[:-1]).square().mean()
        return loss

    def train_step(self, tokens: Tensor, targets: Tensor, casting: Casting = nullcontext) -> Tensor:
        """Perturbed, regularised, clipped."""
        batch = tokens.shape[1]
        values, response = baselines.perturb(self.location, self.raw_scale, self.center, self.ranges, batch)
        values = torch.where(self.shared, values[:1], values).detach()
        response = torch.where(self.shared, response[:1], response)
        loss = self._loss("train", tokens, targets, response, values, casting)
        return self._descend(loss, self.optimizer, 0.25)

    def valid_step(self, tokens: Tensor, targets: Tensor, casting: Casting = nullcontext) -> Tensor:
        """Unperturbed, without regularisation."""
        response = (self.location - self.center).expand(tokens.shape[1], -1)
        loss = self._loss("valid", tokens, targets, response, None, casting)
        return self._descend(loss, self.hyper_optimizer, None)
