"""HyperLSTM: torch.nn.LSTM whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from itertools import count, zip_longest

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stn_fast import functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import (
    check_folding,
    check_response,
    check_sizes,
    check_switches,
    decay_penalty,
    factors_to_use,
    start_gate,
    start_response,
)
from stn_fast.layers.regularisers import DropConnect, PerExampleDropout
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gates import GatedParameters, check_examples, fold, response_input

State = tuple[Tensor, Tensor]


class GatedRecurrent(nn.Module):
    """The gated parameters of modules with the parameters and settings of torch.nn.LSTM or torch.nn.GRU."""

    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    bidirectional: bool
    num_hyperparameters: int
    weight_ih_l0: Tensor

    def _suffixes(self, layer: int) -> list[str]:
        """The suffix of a layer's parameter names for each direction, in the order of the states."""
        return [f"l{layer}", f"l{layer}_reverse"] if self.bidirectional else [f"l{layer}"]

    @property
    def _every_suffix(self) -> list[str]:
        """Those of all layers."""
        return [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]

    def _state_shape(self, *batch: int) -> tuple[int, ...]:
        return (self.num_layers * (2 if self.bidirectional else 1), *batch, self.hidden_size)

    def _weights(self, side: str, suffix: str) -> GatedParameters:
        return GatedParameters._make(getattr(self, f"{name}_{side}_{suffix}", None) for name in GatedParameters._fields)

    def _sides(self) -> Iterator[tuple[str, GatedParameters]]:
        """(suffix of their names, parameters) for input-to-hidden and hidden-to-hidden of every layer and direction."""
        for suffix in self._every_suffix:
            for side in ("ih", "hh"):
                yield f"{side}_{suffix}", self._weights(side, suffix)

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖W + diag(Gw h[b]) R‖², a scalar, summed over all matrices; biases are not decayed."""
        penalties = [
            decay_penalty(
                of_side.weight,
                of_side.response_weight,
                of_side.weight_gate,
                hyper,
                decay,
                of_side.response_projection,
            )
            for _, of_side in self._sides()
        ]
        return torch.stack(penalties).sum()


class GatedLSTM(GatedRecurrent):
    """The computation of `HyperLSTM`, for modules with the parameters and settings of torch.nn.LSTM."""

    def _run(self, x: Tensor, hyper: HyperBatch | Tensor, state: State | None) -> tuple[Tensor, State]:
        """The forward pass of `HyperLSTM`."""
        check_tensor(type(self).__name__, "x", x)
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__}: x must be ({'B, T' if self.batch_first else 'T, B'}, I) or (T, I) with "
                f"I = input_size={self.input_size}, got {tuple(x.shape)}"
            )
        check_response(type(self).__name__, self.num_hyperparameters, hyper)
        batch_dim = 0 if self.batch_first else 1
        self._check_state(state, None if x.ndim == 2 else x.shape[batch_dim])
        if x.ndim == 2:
            state = None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
            y, (h_n, c_n) = self._run(x.unsqueeze(batch_dim), hyper, state)
            return y.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))
        check_examples(type(self).__name__, x, hyper, batch_dim)
        y, after = self._layers(x.transpose(0, 1) if self.batch_first else x, hyper, state)
        return y.transpose(0, 1) if self.batch_first else y, after

    def _layers(self, y: Tensor, hyper: HyperBatch | Tensor, state: State | None) -> tuple[Tensor, State]:
        """(T, B, I) → (T, B, H · directions), and the state after the last step."""
        known = isinstance(hyper, HyperBatch) and hyper.centred  # which the operation makes use of
        h = hyper if known else response_input(hyper, self.weight_ih_l0)
        before = zip(*self._state(y, state), strict=True)
        after: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix, (h_0, c_0) in zip(self._suffixes(layer), before, strict=False):
                weights = self._weights("ih", suffix), self._connected(suffix, hyper)
                output, last = functional.gated_lstm(y, h_0, c_0, *weights, h, reverse=suffix.endswith("reverse"))
                outputs.append(output)
                after.append(last)
            y = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
            y = self._between(layer, y, hyper)
        h_n, c_n = (torch.stack(one) if len(one) > 1 else one[0].unsqueeze(0) for one in zip(*after, strict=True))
        return y, (h_n, c_n)

    def _check_state(self, state: State | None, batch: int | None) -> None:
        """Raises ValueError if the state doesn't fit a batch of this size (None: an x without a batch dimension)."""
        if state is None:
            return
        who = type(self).__name__
        if not isinstance(state, tuple | list) or len(state) != 2:
            got = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
            raise ValueError(f"{who}: state must be two tensors, (h_0, c_0), got {got}")
        shape = self._state_shape() if batch is None else self._state_shape(batch)
        meaning = "H), to fit x without a batch" if batch is None else f"B, H), to fit a batch of {batch}"
        for name, tensor in zip(("h_0", "c_0"), state, strict=True):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{who}: state must be two tensors, (h_0, c_0), got {name} as {type(tensor).__name__}")
            if tensor.shape != shape:
                raise ValueError(
                    f"{who}: {name} must be {shape}, (num_layers · directions, {meaning}, got {tuple(tensor.shape)}"
                )

    def _state(self, x: Tensor, state: State | None) -> State:
        """(h_0, c_0) for x (T, B, I); zeros if ``state`` is None."""
        if state is not None:
            return state
        zeros = x.new_zeros(self._state_shape(x.shape[1]))
        return zeros, zeros

    def _connected(self, suffix: str, hyper: HyperBatch | Tensor) -> GatedParameters:
        """The hidden-to-hidden weights."""
        return self._weights("hh", suffix)

    def _between(self, layer: int, y: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        """What the output y (T, B, H · directions) of a layer becomes before the next one."""
        return y


def dropped_matrices(weights: GatedParameters, drop: Callable[[Tensor], Tensor]) -> GatedParameters:
    """W and R after ``drop``; with a low rank, W alone."""
    weights = weights._replace(weight=drop(weights.weight))
    if weights.response_projection is not None:
        return weights
    return weights._replace(response_weight=drop(weights.response_weight))


class HyperLSTM(GatedLSTM):
    """An LSTM whose matrices respond to each example's hyperparameters h, constant over time (STN, section 3.1).

    i, f, g, o = linear(x_t; h) + linear(h_{t−1}; h), where each linear is a gated linear layer with its own
    parameters, followed by the usual cell; `stn_fast.functional.gated_lstm` gives the formulas.

    Parameters have torch's names and shapes, such as `weight_ih_l0` and `bias_hh_l1_reverse`, so a plain checkpoint
    loads with strict=False; those of the response are named likewise, `response_weight_ih_l0`, `weight_gate_ih_l0`
    and so on. W and b are initialised uniformly in ±1/√hidden_size, as in torch, R and r to 0, and the gates such
    that output o responds to hyperparameter o mod n.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in torch.nn.LSTM.
        dropout: name of the hyperparameter that is the rate of locked dropout after every layer but the last, with one
            mask for all time steps of an example. A second call with the same HyperBatch draws a new mask. None or 0.0
            for no dropout.
        proj_size: must be 0; projections are not supported.
        num_hyperparameters: n, at least 1.
        response_rank: None for full responses; k for a response R = A B of rank k of every matrix, as in `HyperLinear`;
            "auto" for the largest k of each matrix that adds at most 5 % to its multiplications.
        recurrent_dropout: name of the hyperparameter, with per_example=False, that is the rate of DropConnect on the
            hidden-to-hidden matrices. One mask per batch is used for W and R; with a low rank, only W is masked. None
            for no DropConnect.
        stream: number of the first random stream, at least 1; required with dropout or recurrent_dropout. The layer
            uses num_layers − 1 streams for dropout, then one for each layer and direction for DropConnect.

    Shapes in layer l: weight_ih, response_weight_ih (4H, I), where I is input_size, or H · directions for l > 0;
    weight_hh, response_weight_hh (4H, H); biases and their responses (4H,); gates (4H, n). With a low rank,
    response_weight is A (4H, k), initialised to 0, and response_projection is B, (k, I) or (k, H), initialised like W.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: str | float | None = None,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        num_hyperparameters: int,
        response_rank: ResponseRank = None,
        recurrent_dropout: str | None = None,
        stream: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(
            "HyperLSTM",
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_hyperparameters=num_hyperparameters,
        )
        check_switches("HyperLSTM", bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        if proj_size != 0:
            raise ValueError(f"HyperLSTM: proj_size must be 0, projections are not supported, got {proj_size}")
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.bidirectional, self.num_hyperparameters = batch_first, bidirectional, num_hyperparameters
        self.response_rank = response_rank
        wide, n = 4 * hidden_size, num_hyperparameters
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else hidden_size * (2 if bidirectional else 1)
            for suffix in self._suffixes(layer):
                for side, columns in (("ih", inputs), ("hh", hidden_size)):
                    factors = factors_to_use("HyperLSTM", response_rank, (wide, columns))
                    shapes = GatedParameters.shapes((wide, columns), wide, n, factors)
                    for name, shape in zip_longest(GatedParameters._fields, shapes):
                        absent = shape is None or ("bias" in name and not bias)
                        parameter = None if absent else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                        self.register_parameter(f"{name}_{side}_{suffix}", parameter)
        self._add_regularisers(dropout, recurrent_dropout, stream)
        self.reset_parameters()

    def _add_regularisers(self, dropout: str | float | None, recurrent_dropout: str | None, stream: int | None) -> None:
        for name, value in (("dropout", None if dropout == 0 else dropout), ("recurrent_dropout", recurrent_dropout)):
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(
                    f"HyperLSTM: {name} must be the name of the hyperparameter that is its rate, got {value!r}"
                )
            if value is not None and stream is None:
                raise ValueError(f"HyperLSTM with {name}={value!r} needs stream, an int >= 1 that no other layer uses")
        if isinstance(dropout, str) and self.num_layers == 1:
            warnings.warn(
                f"HyperLSTM: dropout={dropout!r} is applied after every layer but the last, and num_layers is 1",
                stacklevel=3,
            )
        self.dropouts, self.drop_connects = nn.ModuleDict(), nn.ModuleDict()
        # Streams are counted for absent regularisers too, so that a mask does not depend on the others.
        streams = count(1 if stream is None else stream)
        for layer in range(self.num_layers - 1):
            own = next(streams)
            if isinstance(dropout, str):
                self.dropouts[f"l{layer}"] = PerExampleDropout(dropout, stream=own, shared_dims=(0,))
        for suffix in self._every_suffix:
            own = next(streams)
            if recurrent_dropout is not None:
                self.drop_connects[suffix] = DropConnect(recurrent_dropout, stream=own)

    @property
    def bound(self) -> float:
        """W and b are initialised uniformly in ±bound."""
        return 1 / math.sqrt(self.hidden_size)

    def reset_parameters(self) -> None:
        bound = self.bound
        for name, parameter in self.named_parameters():
            if "gate" in name:
                start_gate(parameter)
            elif name.startswith("response_weight"):
                start_response(parameter, getattr(self, name.replace("weight", "projection")), bound)
            elif name.startswith("response_bias"):
                nn.init.zeros_(parameter)
            elif not name.startswith("response_projection"):
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Returns the output of the last layer at every time step, and the state after the last time step.

        Args:
            x: (T, B, I), or (B, T, I) if `batch_first`; (T, I) for a single example without a batch dimension.
            hyper: a HyperBatch, or its response (B, n) or (n,); in training mode with dropout, a HyperBatch.
            state: (h_0, c_0), each (num_layers · directions, B, H), without B if x has none; None for zeros.

        Returns:
            (y, (h_n, c_n)): y is shaped like x, with H · directions in place of I; h_n and c_n like `state`.

        Raises:
            TypeError: x is a PackedSequence, which is not supported, or dropout is on and `hyper` is not a HyperBatch.
            ValueError: shapes do not fit together.
        """
        if isinstance(x, PackedSequence):
            raise TypeError(
                "HyperLSTM does not support PackedSequence; pad the sequences (torch.nn.utils.rnn.pad_packed_sequence) "
                "and leave the padding out of the loss"
            )
        if self.training and isinstance(hyper, Tensor) and (self.dropouts or self.drop_connects):
            raise TypeError("HyperLSTM with dropout: hyper must be a HyperBatch in training mode, got its response")
        return self._run(x, hyper, state)

    def _connected(self, suffix: str, hyper: HyperBatch | Tensor) -> GatedParameters:
        """The hidden-to-hidden weights, after DropConnect if there is any."""
        weights = self._weights("hh", suffix)
        if suffix not in self.drop_connects:
            return weights
        drop = self.drop_connects[suffix]
        return dropped_matrices(weights, lambda weight: drop(weight, hyper))

    def _between(self, layer: int, y: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        """y, after the dropout of the layer if there is any."""
        return self.dropouts[f"l{layer}"](y, hyper, example_dim=1) if f"l{layer}" in self.dropouts else y

    @torch.no_grad()
    def fold(self, response: Tensor) -> nn.LSTM:
        """The plain LSTM that this one equals at one response input (n,), without dropout: torch's is not locked."""
        check_folding(self.num_hyperparameters, response)
        plain = nn.LSTM(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            device="meta",
        )
        for ending, of_side in self._sides():
            for name, folded in zip(("weight", "bias"), fold(of_side, response.to(of_side.weight)), strict=True):
                if folded is not None:
                    setattr(plain, f"{name}_{ending}", nn.Parameter(folded))
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}, "
            f"num_hyperparameters={self.num_hyperparameters}"
            f"{'' if self.response_rank is None else f', response_rank={self.response_rank!r}'}"
        )
