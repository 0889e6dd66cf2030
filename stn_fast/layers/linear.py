"""HyperLinear: torch.nn.Linear whose weights respond to each example's hyperparameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import GatedLayer, check_sizes, check_switches, factors_to_use, give_parameters
from stn_fast.ops.arguments import check_tensor


class HyperLinear(GatedLayer):
    """y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r, where h is each example's response input (STN, section 3.1).

    `weight` and `bias` are named and shaped as in torch.nn.Linear, so a plain checkpoint loads with strict=False. W and
    b are initialised uniformly in ±1/√in_features, R and r to 0, and the gates such that output o responds to
    hyperparameter o mod n.

    Args:
        in_features, out_features: I, O.
        bias: whether to have b, r and Gb.
        num_hyperparameters: n, at least 1.
        response_rank: None for a full response, which doubles the multiplications; k for a response R = A B of rank k,
            which adds k (I + O) multiplications to a position's I O; "auto" for the largest k, at least 1, that adds
            at most 5 %. If a full response costs no more than rank k, the layer has a full one, and its response_rank
            is None.

    Shapes: weight, response_weight (O, I); bias, response_bias (O,); weight_gate, bias_gate (O, n). With a low rank,
    response_weight is A (O, k), initialised to 0, and response_projection is B (k, I), initialised like W.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_hyperparameters: int,
        response_rank: ResponseRank = None,
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
        shape = (out_features, in_features)
        factors = factors_to_use("HyperLinear", response_rank, shape)
        super().__init__(shape, bias, num_hyperparameters, device, dtype, factors=factors)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0) -> Tensor:
        """(..., I) → (..., O); `hyper` is a HyperBatch or its response, `example_dim` as in functional.gated_linear."""
        check_tensor("HyperLinear", "x", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"HyperLinear: x must be (..., I) with I = in_features={self.in_features}, got {tuple(x.shape)}"
            )
        self._check_response(hyper)
        parameters, projection = self.gated_parameters[:6], self.response_projection
        return functional.gated_linear(x, *parameters, hyper, example_dim, response_projection=projection)

    def fold(self, response: Tensor) -> nn.Linear:
        """The plain layer that this one equals at one response input (n,)."""
        weight, bias = self._folded(response)
        plain = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        give_parameters(plain, weight, bias)
        return plain

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return ", ".join([sizes, *self._response_repr])
