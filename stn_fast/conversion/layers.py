"""Converted modules of torch.nn: each computes what the gated layer of its kind does, on its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stn_fast import functional
from stn_fast.conversion import plain
from stn_fast.conversion.converted import Converted, is_shared
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.conv import Halves
from stn_fast.layers.embedding import GatedTable
from stn_fast.layers.gated import Gated
from stn_fast.layers.lstm import GatedLSTM, GatedRecurrent, State, dropped_matrices
from stn_fast.layers.regularisers import (
    PerExampleDropout,
    PerExampleNoise,
    dropped_channels,
    dropped_weight,
    shared_draw,
)
from stn_fast.ops.gates import GatedParameters, fold, gates, response_input
from stn_fast.ops.halves import are_halves, make_halves
from stn_fast.ops.tangents import direction_of, dual, paused, split


class _Folding(Converted, Gated):
    def folded(self, response: Tensor) -> dict[str, Tensor]:
        weight, bias = self._folded(response)
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


class Linear(_Folding, nn.Linear):
    """`functional.gated_linear`, with k rows per example if the input has k·B."""

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 1:
            return self.forward(input[None])[0]
        return self.gated_linear(input, self.gated_parameters, self.gating(self.weight))


class Conv2d(Halves, _Folding, nn.Conv2d):
    """`functional.gated_conv2d`, with k images per example if the input has k·B.

    As in `HyperConv2d`, W and R are the halves of one tensor, if R is full and there is one group.
    """

    relu = False

    def join(self) -> None:
        """Makes W and R halves of one tensor, in the memory format of W."""
        if self.response_projection is None and self.groups == 1:
            if self.weight.is_contiguous(memory_format=torch.channels_last):
                self.response_weight.data = self.response_weight.data.to(memory_format=torch.channels_last)
            make_halves(*self._filters())

    def separate(self) -> None:
        if are_halves(*self._filters()):
            self.weight.data = self.weight.data.clone()

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 3:
            return self.forward(input[None])[0]
        given = self.gating_of_rows(input, self.weight)
        geometry: dict[str, Any] = dict(stride=self.stride, padding=self.padding, dilation=self.dilation)
        if self.padding_mode != "zeros":
            input, geometry["padding"] = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        parameters, projection = self.gated_parameters[:6], self.response_projection
        return functional.gated_conv2d(
            input, *parameters, given, groups=self.groups, relu=self.relu, response_projection=projection, **geometry
        )


class ConvReLU2d(Conv2d, plain.ConvReLU2d):
    """The same with ReLU, in one pass."""

    relu = True


class _PlainConv(_Folding):
    """y = conv(x, W) + b + (h Gwᵀ) ⊙ conv(x, R) + (h Gbᵀ) ⊙ r by torch's convolutions, with k rows per example."""

    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # torch's, which pads as the module does
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == len(self.kernel_size) + 1:
            return self.forward(input[None])[0]
        given, parameters = self.gating_of_rows(input, self.weight), self.gated_parameters
        direction = direction_of(given, *parameters)
        if direction is not None:
            return self._dual(input, direction)
        h = response_input(given, self.weight)
        if h.ndim == 1:
            return self._conv_forward(input, *fold(parameters, h))
        y = self._conv_forward(input, self.weight, None)
        return self._gated(y, input, *gates(parameters, h))

    def _gated(self, y: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """y + scale ⊙ conv(x, R) + shift"""
        view = (*scale.shape, *[1] * len(self.kernel_size))
        gated = torch.addcmul(y, scale.view(view).to(y.dtype), self._response_to(x))
        return gated if shift is None else gated + shift.view(view).to(y.dtype)

    def _dual(self, x: Tensor, direction: Tensor) -> Tensor:
        """conv(x, W) + b, with its tangent along a change of h from 0."""
        x, dx = split(x)
        parameters = self.gated_parameters
        bias = None if parameters.bias is None else torch.zeros_like(parameters.bias)
        with paused():
            z = self._conv_forward(x, self.weight, parameters.bias)
            dz = torch.zeros_like(z) if dx is None else self._conv_forward(dx, self.weight, None)
            dz = self._gated(dz, x, *gates(parameters._replace(bias=bias), direction))
        return dual(z, dz)

    def _response_to(self, x: Tensor) -> Tensor:
        """conv(x, R)"""
        if self.response_projection is None:
            return self._conv_forward(x, self.response_weight, None)
        narrow = self._conv_forward(x, self.response_projection, None)
        convolve = F.conv1d if len(self.kernel_size) == 1 else F.conv3d
        return convolve(narrow, self.response_weight, groups=self.groups)


class Conv1d(_PlainConv, nn.Conv1d):
    """torch's, with filters for each example."""


class Conv3d(_PlainConv, nn.Conv3d):
    """torch's, with filters for each example."""


class Embedding(_Folding, GatedTable, nn.Embedding):
    """`functional.gated_embedding`; tokens (1, ...), such as position numbers, are looked up for each example."""

    def forward(self, input: Tensor) -> Tensor:
        given = self.gating(self.weight)
        if not is_shared(given):
            input = self._by_example(input, len(given))
        rows = input if is_shared(given) else self.split(input, len(given))
        e = functional.gated_embedding(
            rows,
            self.weight,
            self.response_weight,
            self.weight_gate,
            given,
            example_dim=self.example_dim,
            padding_idx=self.padding_idx,
            sparse=self.sparse,
            response_projection=self.response_projection,
            **self._dropped(),
        )
        return e.view(*input.shape, self.embedding_dim)

    def _dropped(self) -> dict[str, Any]:
        """Rate and RNG coordinates of dropped words, for `functional.gated_embedding`."""
        return {}

    def takes_any_examples(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and self.example_dim < len(shape) and shape[self.example_dim] == 1

    def _by_example(self, tokens: Tensor, examples: int) -> Tensor:
        dim = self.example_dim
        if self.takes_any_examples(tokens.shape):
            return tokens.expand(*tokens.shape[:dim], examples, *tokens.shape[dim + 1 :])
        if tokens.ndim == 1 and len(tokens) != examples:  # numbers of positions, more likely than several rows each
            raise self.wrong_rows(tokens, 0, examples)
        return tokens


def _tuned_number(attribute: str) -> Any:
    """The strength of a plain module, a float, which a converted one has only in evaluation mode.

    One that no hyperparameter is stays what it was.
    """

    def read(module: Any) -> float:
        if module.name is None:
            return module.__dict__[attribute]
        if module.training:
            raise RuntimeError(
                f"{module.shown}: its {attribute} is read in training mode, in which it is perturbed. Call the module, "
                f"or leave it out: convert(model, exclude={module.dotted_name!r})"
            )
        return module.tuned.values()[module.name]

    def write(module: Any, strength: float) -> None:
        raise AttributeError(
            f"{module.shown}: {attribute} can't be set"
            + (
                ", because the module has been converted without a hyperparameter for it"
                if module.name is None
                else f", because it is the hyperparameter {module.name!r}: change model.tuned_hyperparameters.location"
            )
        )

    return property(read, write)


class _Regularised(Converted):
    """A module without parameters whose strength is a hyperparameter, applied to each row of an example by itself."""

    name: str
    _tuned_attribute = "p"


class GaussianNoise(_Regularised, PerExampleNoise, plain.GaussianNoise):
    """Noise, each example with its own standard deviation."""

    _tuned_attribute = "std"
    std = _tuned_number("std")

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        hyper, dim = self.hyper, self.example_dim
        if hyper is None or not self.training:
            return input
        rows = self.split(plain.floating_point(self.shown, input), len(hyper))
        y = functional.noise(rows, self._strength(rows, hyper, dim), **self._draw(hyper), example_dim=dim)
        return y.view_as(input)


class _Dropout(_Regularised, PerExampleDropout):
    """Inverted dropout, each example at its own rate; each of its rows has its own mask, if it has several.

    It never changes its input, also if ``inplace`` is set: a training step calls the model twice with the same batch.
    """

    p = _tuned_number("p")

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        hyper = self.hyper
        if hyper is None or not self.training:
            return input
        rows = self.split(plain.floating_point(self.shown, input), len(hyper))
        return self._drop(rows, hyper, self._shared(input, rows.ndim - input.ndim)).view_as(input)

    def _drop(self, rows: Tensor, hyper: HyperBatch, shared_dims: tuple[int, ...]) -> Tensor:
        dim = self.example_dim
        strength = self._strength(rows, hyper, dim)
        return functional.dropout(rows, strength, **self._draw(hyper), example_dim=dim, shared_dims=shared_dims)

    def _shared(self, x: Tensor, more: int) -> tuple[int, ...]:
        """The dimensions that share a mask, after the example dimension of x was split into 1 + `more` dimensions."""
        return ()


class Dropout(_Dropout, nn.Dropout):
    """torch's, each example at its own rate."""


class _ChannelDropout(_Dropout):
    """Dropout of whole channels of an input (N, C, ...)."""

    mask_dims: int  # how many dimensions follow the channels

    def _shared(self, x: Tensor, more: int) -> tuple[int, ...]:
        if x.ndim != self.mask_dims + 2:
            raise ValueError(
                f"{self.shown}: its input must have {self.mask_dims + 2} "
                f"dimensions, with the examples first, got {tuple(x.shape)}"
            )
        return tuple(range(-self.mask_dims, 0))


class Dropout1d(_ChannelDropout, nn.Dropout1d):
    """torch's, for (N, C, L)."""

    mask_dims = 1


class Dropout2d(_ChannelDropout, nn.Dropout2d):
    """torch's, for (N, C, H, W)."""

    mask_dims = 2

    def _drop(self, rows: Tensor, hyper: HyperBatch, shared_dims: tuple[int, ...]) -> Tensor:
        if rows.ndim > 4:
            return super()._drop(rows, hyper, shared_dims)
        return dropped_channels(rows, self._strength(rows, hyper, 0), **self._draw(hyper))


class Dropout3d(_ChannelDropout, nn.Dropout3d):
    """torch's, for (N, C, D, H, W)."""

    mask_dims = 3


class LockedDropout(_Dropout, plain.LockedDropout):
    """One mask for all positions of an example, at its own rate."""

    @property
    def leave_out(self) -> str:
        return f"use LockedDropout(dim=1) if its input is (B, T, D), or {super().leave_out}"

    def _shared(self, x: Tensor, more: int) -> tuple[int, ...]:
        if self.dim >= x.ndim or self.dim == self.example_dim:
            raise ValueError(
                f"{self.shown}: dim={self.dim} must be a dimension of its input {tuple(x.shape)} other than "
                f"{self.example_dim}, which counts the examples: use LockedDropout(dim={0 if self.example_dim else 1}) "
                "or declare another one in example_dims of convert"
            )
        return (self.dim + more if self.dim > self.example_dim else self.dim,)

    def _drop(self, rows: Tensor, hyper: HyperBatch, shared_dims: tuple[int, ...]) -> Tensor:
        (dim,), examples = shared_dims, self.example_dim
        if dim in (examples + 1, rows.ndim - 1) or (dim, examples) == (0, 1):
            return super()._drop(rows, hyper, shared_dims)
        # Between two other dimensions, such as (B, k, T, D): by the same mask, of its own shape.
        shape = [*rows.shape[:dim], 1, *rows.shape[dim + 1 :]]
        return rows * super()._drop(rows.new_ones(shape), hyper, ())


class EmbeddingWithDropout(Embedding, plain.EmbeddingWithDropout):
    """`functional.gated_embedding`, with one rate and one draw of dropped words for the batch."""

    name: str | None
    stream: int
    _tuned_attribute = "p"
    p = _tuned_number("p")

    def _dropped(self) -> dict[str, Any]:
        hyper = self.hyper
        if hyper is None or not self.training or self.name is None or not len(hyper):
            return {}
        return dict(rate=hyper[self.name][:1], **shared_draw(hyper, self.stream))

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, p={self.name!r}"


class Conv1D(Converted, GatedTable):
    """transformers' linear layer y = x W + b, whose weight (I, O) is that of `Linear` transposed."""

    nf: int

    def forward(self, x: Tensor) -> Tensor:
        return self.gated_linear(x, self._as_linear, self.gating(self.weight))

    @torch.no_grad()
    def folded(self, response: Tensor) -> dict[str, Tensor]:
        weight, bias = fold(self._as_linear, response.to(self.weight))
        assert bias is not None  # it always has one
        return {"weight": weight.T, "bias": bias}


class DropPath(_Dropout):
    """timm's, which drops all of a row."""

    inplace = False
    _tuned_attribute = "drop_prob"
    drop_prob = _tuned_number("drop_prob")

    def _shared(self, x: Tensor, more: int) -> tuple[int, ...]:
        of_example = range(self.example_dim, self.example_dim + more + 1)
        return tuple(dim for dim in range(x.ndim + more) if dim not in of_example)


class _Recurrent(Converted, GatedRecurrent):
    """What LSTM and GRU share. Dropout between layers has a mask for every time step, as torch's."""

    name: str | None
    streams: tuple[int, ...]
    _tuned_attribute = "dropout"

    def _given(self, input: Tensor | PackedSequence) -> HyperBatch | Tensor:
        """What gated operations take; an input with two dimensions is of one example.

        Raises:
            TypeError: it is a PackedSequence.
        """
        if isinstance(input, PackedSequence):
            raise TypeError(
                f"{self.shown}: a converted {self.plain_class.__name__} does not support PackedSequence: pad the "
                f"sequences, or leave it out, convert(model, exclude={self.dotted_name!r})"
            )
        if input.ndim == 2:
            return self.gating(self.weight_ih_l0)
        return self.gating_of_rows(input, self.weight_ih_l0, self.example_dim)

    def _between(self, layer: int, y: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        batch = self.hyper
        if batch is None or not self.training or self.name is None or layer == self.num_layers - 1:
            return y
        rows = y.unflatten(1, (len(batch), -1))
        return functional.dropout(rows, batch[self.name], **batch.draw(self.streams[layer]), example_dim=1).view_as(y)

    @torch.no_grad()
    def folded(self, response: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for ending, parameters in self._sides():
            weight, bias = fold(parameters, response.to(parameters.weight))
            found[f"weight_{ending}"] = weight
            if bias is not None:
                found[f"bias_{ending}"] = bias
        return found


class LSTM(_Recurrent, GatedLSTM, nn.LSTM):
    """As `HyperLSTM`, but for its dropout between layers."""

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: State | None = None
    ) -> tuple[Tensor, State]:
        return self._run(input, self._given(input), hx)


class GRU(_Recurrent, nn.GRU):
    """torch.nn.GRU whose weights respond to hyperparameters, computed one time step after the other.

    r, z = σ(x_t W_r,z + h_{t−1} U_r,z), n = tanh(x_t W_n + r ⊙ h_{t−1} U_n) and h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}, where
    the products with W and with U, which include biases, are gated linear layers.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given, batch_dim = self._given(input), 0 if self.batch_first else 1
        if input.ndim == 2:
            y, last = self._run(input.unsqueeze(batch_dim), given, None if hx is None else hx.unsqueeze(1))
            return y.squeeze(batch_dim), last.squeeze(1)
        return self._run(input, given, hx)

    def _run(self, x: Tensor, given: HyperBatch | Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        y = x.transpose(0, 1) if self.batch_first else x
        before = y.new_zeros(self._state_shape(y.shape[1])) if state is None else state
        self.check_forward_args(x, before, None)
        after: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes(layer):
                outputs.append(self._one_way(y, before[len(after)], suffix, given))
                after.append(outputs[-1][0 if suffix.endswith("reverse") else -1])
            y = self._between(layer, torch.cat(outputs, dim=-1), given)
        return y.transpose(0, 1) if self.batch_first else y, torch.stack(after)

    def _one_way(self, x: Tensor, h: Tensor, suffix: str, given: HyperBatch | Tensor) -> Tensor:
        """(T, B, I) and the state (B, H) before the first step → (T, B, H)."""
        of_input, of_state = self._weights("ih", suffix), self._weights("hh", suffix)
        steps = _gated(x, of_input, given, 1)
        outputs = []
        for step in reversed(steps) if suffix.endswith("reverse") else steps:
            x_r, x_z, x_n = step.chunk(3, -1)
            h_r, h_z, h_n = _gated(h, of_state, given, 0).chunk(3, -1)
            n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
            h = n + torch.sigmoid(x_z + h_z) * (h - n)
            outputs.append(h)
        return torch.stack(outputs[::-1] if suffix.endswith("reverse") else outputs)


def _gated(x: Tensor, parameters: GatedParameters, given: HyperBatch | Tensor, example_dim: int) -> Tensor:
    projection = parameters.response_projection
    return functional.gated_linear(x, *parameters[:6], given, example_dim, response_projection=projection)


class DropConnectLSTM(LSTM, plain.DropConnectLSTM):
    """As `HyperLSTM` with recurrent dropout: one mask for W and R, and one rate for the batch."""

    _tuned_attribute = "p"
    p = _tuned_number("p")

    def _between(self, layer: int, y: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        return y

    def _connected(self, suffix: str, hyper: HyperBatch | Tensor) -> GatedParameters:
        weights, batch = super()._connected(suffix, hyper), self.hyper
        if batch is None or not self.training or self.name is None or not len(batch):
            return weights
        draw = shared_draw(batch, self.streams[self._every_suffix.index(suffix)])
        return dropped_matrices(weights, partial(dropped_weight, rate=batch[self.name][:1], **draw))

    def extra_repr(self) -> str:
        return f"{nn.LSTM.extra_repr(self)}, p={self.name!r}"
