"""HyperLinear: torch.nn.Linear whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.gated_linear import fold


class HyperLinear(nn.Module):
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
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("num_hyperparameters", num_hyperparameters),
        ):
            if value < 1:
                raise ValueError(f"HyperLinear wants {name} >= 1; got {value}")
        self.in_features, self.out_features = in_features, out_features
        self.num_hyperparameters = num_hyperparameters

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = parameter(out_features, in_features)
        self.response_weight = parameter(out_features, in_features)
        self.weight_gate = parameter(out_features, num_hyperparameters)
        self.bias: nn.Parameter | None = None
        self.response_bias: nn.Parameter | None = None
        self.bias_gate: nn.Parameter | None = None
        if bias:
            self.bias, self.response_bias = parameter(out_features), parameter(out_features)
            self.bias_gate = parameter(out_features, num_hyperparameters)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features)
        for uniform in (self.weight, self.bias, self.response_weight, self.response_bias):
            if uniform is not None:
                nn.init.uniform_(uniform, -bound, bound)
        for gate in (self.weight_gate, self.bias_gate):
            if gate is not None:
                nn.init.normal_(gate, std=0.01)

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0) -> Tensor:
        """(..., I) → (..., O); `hyper` is a HyperBatch or its response, `example_dim` as in functional.gated_linear."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"HyperLinear has in_features={self.in_features}; got x {tuple(x.shape)}")
        response = hyper if isinstance(hyper, Tensor) else hyper.response
        if response.shape[-1] != self.num_hyperparameters:
            raise ValueError(
                f"HyperLinear has num_hyperparameters={self.num_hyperparameters}; got {response.shape[-1]} of them "
                "(num_hyperparameters=len(space) fits)"
            )
        return functional.gated_linear(
            x,
            self.weight,
            self.bias,
            self.response_weight,
            self.response_bias,
            self.weight_gate,
            self.bias_gate,
            hyper,
            example_dim,
        )

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖W + diag(Gw h[b]) R‖², a scalar; biases are not decayed."""
        h = functional.response_input(hyper, self.weight)
        return functional.weight_decay_penalty(self.weight, self.response_weight, self.weight_gate, h, decay)

    @torch.no_grad()
    def fold(self, response: Tensor) -> nn.Linear:
        """The plain layer this one is at one response input (n,)."""
        if response.shape != (self.num_hyperparameters,):
            raise ValueError(
                f"fold wants a response of shape ({self.num_hyperparameters},); got {tuple(response.shape)}"
            )
        weight, bias = fold(
            self.weight,
            self.bias,
            self.response_weight,
            self.response_bias,
            self.weight_gate,
            self.bias_gate,
            response.to(self.weight),
        )
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        plain.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
        return plain

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"num_hyperparameters={self.num_hyperparameters}"
        )
