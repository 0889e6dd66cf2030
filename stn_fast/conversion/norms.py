"""Converted norms of torch.nn, timm and transformers: a scale and a shift for each example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.conversion.converted import Converted, is_shared
from stn_fast.conversion.layers import _Folding
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.batch_norm import GatedBatchNorm
from stn_fast.layers.gated import Gated
from stn_fast.ops.gates import response_input
from stn_fast.ops.tangents import direction_of, dual, is_centred, paused
from stn_fast.ops.transforms import in_transform
from stn_fast.ops.uncast import product


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x ⊙ scale + shift; a shift has as many entries as the scale."""
    return x * scale if shift is None else torch.addcmul(shift.view_as(scale), x, scale)


class _Norm(Converted, Gated):
    """y = x̂ ⊙ (weight + (h Gwᵀ) ⊙ R) + bias + (h Gbᵀ) ⊙ r, where x̂ is x normalised by torch."""

    def _scale_and_shift(self, given: HyperBatch | Tensor) -> tuple[Tensor, Tensor | None]:
        """Of every example: (B, *weight.shape). Along a change of h from 0, the weight and bias with their tangents."""
        weight, bias, response_weight, response_bias, weight_gate, bias_gate, _ = self.gated_parameters
        direction = direction_of(given, *self.gated_parameters)
        h = response_input(given, weight) if direction is None else direction
        h = h if h.ndim == 2 else h[None]

        def responding(plain: Tensor, response: Tensor, gate: Tensor) -> Tensor:
            if direction is None:
                return torch.addcmul(plain, product(h, gate.T).view(shape), response)
            with paused():
                tangent = product(h, gate.T).view(shape) * response
            return dual(plain.expand(shape).contiguous(), tangent)

        shape = (len(h), *weight.shape)
        scale = responding(weight, response_weight, weight_gate)
        if bias is None or response_bias is None or bias_gate is None:
            return scale, None
        return scale, responding(bias, response_bias, bias_gate)

    @torch.no_grad()
    def folded(self, response: Tensor) -> dict[str, Tensor]:
        weight, bias = self._scale_and_shift(response.to(self.weight))
        return {"weight": weight[0]} if bias is None else {"weight": weight[0], "bias": bias[0]}

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """0: the scale and shift of normalised activations are not decayed."""
        return torch.zeros_like(decay).sum()


class _NormOfLast(_Norm):
    """A norm over the last dimensions, those of the weight; the example dimension is another one."""

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _with_rows(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        """Of x (..., *weight.shape), with scale and shift for each of its rows, which broadcast to it."""
        normal = self._normalised(x, None, None)
        return _affine(normal, scale, shift).to(normal.dtype)

    def forward(self, input: Tensor) -> Tensor:
        given = self.gating(self.weight)
        if is_shared(given):
            scale, shift = self._scale_and_shift(given)
            return self._normalised(input, scale[0], None if shift is None else shift[0])
        if self.example_dim >= input.ndim - self.weight.ndim:
            raise self.wrong_rows(input, self.example_dim, len(given))
        if is_centred(given):
            return self._normalised(input, self.weight, getattr(self, "bias", None))
        rows = self.split(input, len(given))
        view = [1] * (rows.ndim - self.weight.ndim)
        view[self.example_dim] = len(given)
        scale, shift = self._scale_and_shift(given)
        return self._with_rows(rows, scale.view(*view, *self.weight.shape), shift).reshape(input.shape)


class LayerNorm(_NormOfLast, nn.LayerNorm):  # type: ignore[misc]
    """torch's, with a scale and a shift for each example."""

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(_NormOfLast, nn.RMSNorm):  # type: ignore[misc]
    """torch's, with a scale for each example."""

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class _ChannelsFirst(_NormOfLast):
    """A norm over the channels of images (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(_ChannelsFirst, LayerNorm):  # type: ignore[misc]
    """timm's, with a scale and a shift of the channels for each example."""


class RMSNorm2d(_ChannelsFirst, RMSNorm):  # type: ignore[misc]
    """timm's, with a scale of the channels for each example."""

    eps: float

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return normal if weight is None else normal * weight


class OwnNorm(_NormOfLast):
    """A norm that `takes_stacked_weights`: its own forward, with the weight of each example."""

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _forward_with(self, self.plain_class, x, weight)

    def _with_rows(self, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        return self._normalised(x, scale, None)


def _forward_with(norm: nn.Module, kind: type[nn.Module], x: Tensor, weight: Tensor | None) -> Tensor:
    """The forward of the class, with the attributes of the norm, but another weight."""
    other = object.__new__(kind)
    other.__dict__.update(norm.__dict__, _parameters=norm._parameters | {"weight": weight})
    return kind.forward(other, x)


@torch.no_grad()
def takes_stacked_weights(norm: nn.Module) -> bool:
    """Whether forward with weights (2, 1, D) in place of (D,) gives each x (D,) of (2, 3, D) what its weight gives.

    Forward functions that multiply by the weight do, such as x ⊙ weight / √(mean x² + ε), in any precision.
    """
    weight, generator = norm.weight, torch.Generator().manual_seed(0)
    assert isinstance(weight, nn.Parameter)
    x, weights = (torch.randn(2, rows, len(weight), generator=generator).to(weight) for rows in (3, 1))
    try:
        y = _forward_with(norm, type(norm), x, weights)
        want = torch.stack([_forward_with(norm, type(norm), x[i], weights[i, 0]) for i in range(2)])
    except Exception:  # of a function that is not known
        return False
    return y.shape == want.shape == x.shape and bool((y - want).norm() <= 1e-3 * want.norm())


class GroupNorm(_Norm, nn.GroupNorm):  # type: ignore[misc]
    """torch's, with a scale and a shift of the channels for each example."""

    def forward(self, input: Tensor) -> Tensor:
        given = self.gating_of_rows(input, self.weight)
        if is_centred(given):
            return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        scale, shift = self._scale_and_shift(given)
        if is_shared(given):
            return F.group_norm(input, self.num_groups, scale[0], None if shift is None else shift[0], self.eps)
        normal = F.group_norm(input, self.num_groups, None, None, self.eps)
        scale = scale.view(*scale.shape, *[1] * (input.ndim - 2))
        return _affine(normal, scale, shift).to(normal.dtype)


class _BatchNorm(GatedBatchNorm, _Folding):
    track_running_stats: bool

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        given = self.gating_of_rows(input, self.weight)
        if self.training and self.track_running_stats and not in_transform():
            self.num_batches_tracked.add_(1)
        images = input.flatten(3) if input.ndim > 4 else input.view(*input.shape, *[1] * (4 - input.ndim))
        normal = self._affine(images, given, response_input(given, self.weight))
        # Not a view of itself, in which an activation in place would cost copies and the memory format of its gradient.
        return normal if input.ndim == 4 else normal.view_as(input)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):  # type: ignore[misc]
    """As `HyperBatchNorm2d`, for (N, C) and (N, C, L)."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):  # type: ignore[misc]
    """As `HyperBatchNorm2d`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):  # type: ignore[misc]
    """As `HyperBatchNorm2d`, for (N, C, D, H, W)."""


class _Activated(Converted):
    """Followed by the dropout and the activation that are children of the module."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class GroupNormAct(_Activated, GroupNorm):  # type: ignore[misc]
    """timm's, with a scale and a shift of the channels for each example."""


class BatchNormAct2d(_Activated, BatchNorm2d):  # type: ignore[misc]
    """timm's, as `HyperBatchNorm2d`."""
