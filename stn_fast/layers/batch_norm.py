"""HyperBatchNorm2d: torch.nn.BatchNorm2d whose scale and shift respond to each example's hyperparameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast import checks
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import Gated, GatedLayer, check_sizes, give_parameters
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gates import check_examples, response_input
from stn_fast.ops.tangents import direction_of, dual, is_centred, paused, split
from stn_fast.ops.transforms import in_transform
from stn_fast.ops.uncast import product


class GatedBatchNorm(Gated):
    """The computation of `HyperBatchNorm2d`, for modules with the parameters and buffers of torch.nn.BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    bias: nn.Parameter
    response_bias: nn.Parameter
    bias_gate: nn.Parameter
    eps: float
    momentum: float | None

    def _affine(self, x: Tensor, hyper: HyperBatch | Tensor, h: Tensor) -> Tensor:
        """The result for x (B, C, H, W) and h, (B, n) or (n,), the response input of `hyper`."""
        if (direction := direction_of(hyper, *self.gated_parameters)) is not None:
            return self._dual(x, direction)
        if is_centred(hyper):
            return self._normalised(x, self.weight, self.bias)
        # y = x̂ ⊙ scale + shift, and x̂ = (x - mean) / deviation
        rows = (h if h.ndim == 2 else h[None]).to(self.weight.dtype)
        scale = torch.addcmul(self.weight, product(rows, self.weight_gate.T), self.response_weight)
        shift = torch.addcmul(self.bias, product(rows, self.bias_gate.T), self.response_bias)
        if h.ndim == 1:
            return self._normalised(x, scale[0], shift[0])
        if self._uses_batch:
            x = self._normalised(x)
        else:
            scale = scale * (self.running_var + self.eps).rsqrt()
            shift = torch.addcmul(shift, self.running_mean, scale, value=-1)
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None]).to(x.dtype)

    def _dual(self, x: Tensor, direction: Tensor) -> Tensor:
        """x̂ ⊙ weight + bias, with its tangent along a change of h from 0."""
        normal, tangent = split(self._normalised(x))
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        with paused():
            scale = product(direction, self.weight_gate.T) * self.response_weight
            shift = product(direction, self.bias_gate.T) * self.response_bias
            dy = torch.addcmul(shift[:, :, None, None], normal, scale[:, :, None, None])
            if tangent is not None:
                dy = torch.addcmul(dy, tangent, weight)
            y = torch.addcmul(bias, normal, weight)
        return dual(y.to(x.dtype), dy.to(x.dtype))

    def _normalised(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self._uses_batch and (in_transform() or self.running_mean is None or not self._tracks):
            return F.batch_norm(x, None, None, scale, shift, True, 0.0, self.eps)
        momentum = 0.0 if not self.training else self.momentum
        if momentum is None:
            momentum = 1 / float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean, self.running_var, scale, shift, self.training, momentum, self.eps)

    @property
    def _tracks(self) -> bool:
        """Whether training updates the running statistics; plain layers have a switch for it."""
        return getattr(self, "track_running_stats", True)

    @property
    def _uses_batch(self) -> bool:
        """Whether x is normalised by the statistics of the batch, not by the running ones."""
        return self.training or self.running_mean is None

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """0: the scale and shift of normalised activations are not decayed."""
        return torch.zeros_like(decay).sum()


class HyperBatchNorm2d(GatedBatchNorm, GatedLayer):
    """y = x̂ ⊙ (weight + (h Gwᵀ) ⊙ R) + bias + (h Gbᵀ) ⊙ r, where x̂ is x normalised per channel.

    Training mode normalises by the mean and variance of the batch and updates the running statistics, which eval mode
    normalises by. The running statistics therefore come from batches with *perturbed* hyperparameters, centred on the
    values that validation steps and evaluations use. A pass in eval mode, under forward-mode AD or inside torch.func
    does not update them (the response step of Δ-STN reuses the batch of its general step, which is already counted).

    As in torch.nn.BatchNorm2d, scale and shift stay in the dtype of the parameters under autocast.

    Parameters and buffers are named and shaped as in torch.nn.BatchNorm2d, so a plain checkpoint loads with
    strict=False. weight is initialised to 1, bias and the responses R, r to 0, and the gates
    such that channel c responds to hyperparameter c mod n.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics, in [0, 1]; None for the average over all batches so
            far. As in torch, None reads the batch count back from the device at each training pass.
        num_hyperparameters: n, at least 1.

    With several processes, each normalises by its own part of the batch, as torch.nn.BatchNorm2d does;
    torch.nn.SyncBatchNorm.convert_sync_batchnorm does not convert this layer.

    Shapes: weight, response_weight, bias, response_bias, running_mean, running_var (C,); weight_gate, bias_gate (C, n).

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    bias: nn.Parameter
    response_bias: nn.Parameter
    bias_gate: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        num_hyperparameters: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes("HyperBatchNorm2d", num_features=num_features, num_hyperparameters=num_hyperparameters)
        if momentum is not None and not 0 <= checks.real_number("HyperBatchNorm2d", "momentum", momentum) <= 1:
            raise ValueError(f"HyperBatchNorm2d: momentum must be in [0, 1], or None for the average, got {momentum}")
        if checks.real_number("HyperBatchNorm2d", "eps", eps) < 0:
            raise ValueError(f"HyperBatchNorm2d: eps must be >= 0, got {eps}")
        super().__init__((num_features,), True, num_hyperparameters, device, dtype)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W); `hyper` is a HyperBatch or its response."""
        check_tensor("HyperBatchNorm2d", "x", x)
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"HyperBatchNorm2d: x must be (B, C, H, W) with C = num_features={self.num_features}, "
                f"got {tuple(x.shape)}"
            )
        one_is_double = (x.dtype == torch.float64) != (self.weight.dtype == torch.float64)
        if one_is_double or not x.is_floating_point():
            raise ValueError(
                f"HyperBatchNorm2d has {self.weight.dtype} parameters, but x is {x.dtype}; cast one, as in x.to(weight)"
            )
        self._check_response(hyper)
        check_examples("HyperBatchNorm2d", x, hyper)
        h = response_input(hyper, self.weight)
        if h.ndim not in (1, 2) or (h.ndim == 2 and len(h) != len(x)):
            raise ValueError(f"HyperBatchNorm2d: h must be (B, n) or (n,) for x {tuple(x.shape)}, got {tuple(h.shape)}")
        if self.training:
            if len(x) < 2:
                raise ValueError(
                    f"HyperBatchNorm2d: x must have at least 2 examples in training mode, got {len(x)} "
                    "(use a larger batch, drop the last one, or call eval())"
                )
            if not in_transform():
                self.num_batches_tracked.add_(1)
        return self._affine(x, hyper, h)

    def fold(self, response: Tensor) -> nn.BatchNorm2d:
        """The plain layer that this one equals at one response input (n,), with a copy of the running statistics."""
        weight, bias = self._folded(response)
        plain = nn.BatchNorm2d(self.num_features, self.eps, self.momentum, device="meta")
        give_parameters(plain, weight, bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(plain, name, getattr(self, name).clone())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"num_hyperparameters={self.num_hyperparameters}"
        )
