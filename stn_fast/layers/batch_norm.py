"""HyperBatchNorm2d: torch.nn.BatchNorm2d whose scale and shift respond to each example's hyperparameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast import checks
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import GatedLayer, check_sizes, give_parameters
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gates import check_examples, response_input
from stn_fast.ops.transforms import in_transform
from stn_fast.ops.uncast import product


class HyperBatchNorm2d(GatedLayer):
    """y = x̂ ⊙ (weight + (h Gwᵀ) ⊙ R) + bias + (h Gbᵀ) ⊙ r, x̂ being x normalised channel by channel.

    In training x̂ has the batch's own mean and variance, and so do the running statistics that eval mode uses. The
    batches are those run in training mode, hence those of *perturbed* hyperparameters: the activations that a
    validation step, itself perturbed, and an evaluation meet are spread around the same point. An eval-mode pass never
    changes them, nor does one under forward-mode AD or torch.func: the response step of a delta-STN is run on the batch
    that its general step has already counted.

    Scale and shift are computed in the dtype of the parameters under autocast too, as torch.nn.BatchNorm2d's are.

    Parameters and buffers are named and shaped as in torch.nn.BatchNorm2d, so a plain checkpoint loads with
    strict=False. weight starts at 1 and bias at 0; the responses R, r uniform in ±1, as ±1/√fan_in with the one input
    that a channel has; the gates from N(0, 0.01²).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics, in [0, 1]; None for their plain average over all
            batches so far. Its count is then read back from the device at each training pass, as torch does.
        num_hyperparameters: n, at least 1.

    Processes that share a batch each have the statistics of their own part of it, as torch.nn.BatchNorm2d has:
    torch.nn.SyncBatchNorm.convert_sync_batchnorm leaves this layer as it is.

    Shapes: weight, response_weight, bias, response_bias, running_mean, running_var (C,); weight_gate, bias_gate (C, n).

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
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
        """(B, C, H, W) → the same; `hyper` is a HyperBatch or its response."""
        check_tensor("HyperBatchNorm2d", "x", x)
        if x.ndim != 4 or x.shape[1] != self.num_features:
            raise ValueError(
                f"HyperBatchNorm2d has num_features={self.num_features} of (B, C, H, W); got x {tuple(x.shape)}"
            )
        one_is_double = (x.dtype == torch.float64) != (self.weight.dtype == torch.float64)
        if one_is_double or not x.is_floating_point():
            raise ValueError(f"HyperBatchNorm2d is {self.weight.dtype} and x {x.dtype}; cast one, as in x.to(weight)")
        self._check_response(hyper)
        check_examples("HyperBatchNorm2d", x, hyper)
        h = response_input(hyper, self.weight)
        if h.ndim not in (1, 2) or (h.ndim == 2 and len(h) != len(x)):
            raise ValueError(f"HyperBatchNorm2d wants h (B, n) or (n,) for x {tuple(x.shape)}; got {tuple(h.shape)}")
        if self.training:
            if len(x) < 2:
                raise ValueError(
                    f"HyperBatchNorm2d normalises by the batch in training and wants at least 2 examples; got {len(x)} "
                    "(use a larger batch or drop the last one, or call eval())"
                )
            if not in_transform():
                self.num_batches_tracked.add_(1)
        # y = x̂ ⊙ scale + shift, and x̂ = (x - mean) / deviation
        rows = (h if h.ndim == 2 else h[None]).to(self.weight.dtype)
        scale = torch.addcmul(self.weight, product(rows, self.weight_gate.T), self.response_weight)
        shift = torch.addcmul(self.bias, product(rows, self.bias_gate.T), self.response_bias)
        if h.ndim == 1:
            return self._normalised(x, scale[0], shift[0])
        if self.training:
            x = self._normalised(x)
        else:
            scale = scale * (self.running_var + self.eps).rsqrt()
            shift = torch.addcmul(shift, self.running_mean, scale, value=-1)
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None]).to(x.dtype)

    def _normalised(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if self.training and in_transform():
            return F.batch_norm(x, None, None, scale, shift, True, 0.0, self.eps)
        momentum = 0.0 if not self.training else self.momentum
        if momentum is None:
            momentum = 1 / float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean, self.running_var, scale, shift, self.training, momentum, self.eps)

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """0: weight decay is for filters, and leaves the scale and shift of normalised activations alone."""
        return torch.zeros_like(decay).sum()

    def fold(self, response: Tensor) -> nn.BatchNorm2d:
        """The plain layer this one is at one response input (n,), with a copy of the running statistics."""
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
