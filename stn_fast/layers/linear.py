"""HyperLinear: torch.nn.Linear whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import GatedLayer, check_sizes, check_switches, give_parameters
from stn_fast.ops.arguments import check_tensor


class HyperLinear(GatedLayer):
    """y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r, h being each example's response input (STN, section 3.1).

    `weight` and `bias` are named and shaped as in torch.nn.Linear, so a plain checkpoint loads into them with
    strict=False. W, R, b, r start uniform in ±1/√in_features and the gates from N(0, 0.01²), as published.

    Args:
        in_features, out_features: I, O.
        bias: whether to have b, and with it r and Gb.
        num_hyperparameters: n, at least 1.

    Shapes: weight, response_weight (O, I); bias, response_bias (O,); weight_gate, bias_gate (O, n).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_hyperparameters: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(
            "HyperLinear",
            in_features=in_features,
            out_features=out_features,
            num_hyperparameters=num_hyperparameters,
        )
        check_switches("HyperLinear", bias=bias)
        super().__init__((out_features, in_features), bias, num_hyperparameters, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0) -> Tensor:
        """(..., I) → (..., O); `hyper` is a HyperBatch or its response, `example_dim` as in functional.gated_linear."""
        check_tensor("HyperLinear", "x", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"HyperLinear has in_features={self.in_features}; got x {tuple(x.shape)}")
        self._check_response(hyper)
        return functional.gated_linear(x, *self.gated_parameters, hyper, example_dim)

    def fold(self, response: Tensor) -> nn.Linear:
        """The plain layer this one is at one response input (n,)."""
        weight, bias = self._folded(response)
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        give_parameters(plain, weight, bias)
        return plain

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"num_hyperparameters={self.num_hyperparameters}"
        )
