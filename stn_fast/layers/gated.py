"""What layers with a response have in common: their parameters, how these start, decay and fold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stn_fast import checks, functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.gates import GatedParameters, fold, response_input

AUTO_OVERHEAD = 0.05  # of the plain layer's multiplications, which a response of the rank "auto" adds at most


class Factors(NamedTuple):
    """The shapes of A and B of a response R = A B of rank k."""

    rank: int
    response_weight: tuple[int, ...]
    response_projection: tuple[int, ...]


def rank_to_use(layer: str, response_rank: ResponseRank, whole: int, each: int) -> int | None:
    """The k of a response of low rank; None for a full one.

    Args:
        layer: for the message.
        response_rank: what was asked for: k; "auto" for the largest, at least 1, whose k · ``each`` are within
            AUTO_OVERHEAD of ``whole``; None for a full response. Where k · ``each`` are not fewer than ``whole``, low
            rank would cost more and say less, and the response is full.
        whole: numbers of W, and multiplications that the plain layer makes with it.
        each: those that each rank adds.

    Raises:
        ValueError: response_rank is none of these.
    """
    if response_rank is None:
        return None
    if response_rank == "auto":
        response_rank = max(1, int(AUTO_OVERHEAD * whole / each))
    checks.whole_number(layer, "response_rank", response_rank, 1, otherwise=", 'auto' or None for full rank")
    return response_rank if response_rank * each < whole else None


def start_response(response_weight: Tensor, projection: Tensor | None, bound: float) -> None:
    """Draws R uniformly in ±bound, or A and B uniformly so that the entries of R have that variance.

    B starts as R would, and A with the variance 1/k, so that u = B x is of the size of W x, and A u of that too.
    """
    if projection is None:
        nn.init.uniform_(response_weight, -bound, bound)
        return
    of_factor = math.sqrt(3 / response_weight.shape[1])
    nn.init.uniform_(response_weight, -of_factor, of_factor)
    nn.init.uniform_(projection, -bound, bound)


class GatedLayer(nn.Module):
    """W, b, their responses R, r and the gates Gw, Gb of a layer with O outputs and n hyperparameters.

    W, R, b, r start uniform in ±1/√fan_in and the gates from N(0, 0.01²), as published. With factors R = A B is of low
    rank: `response_weight` is A, `response_projection` B, and the entries of R start with the variance of a full one.

    Args:
        weight_shape: of W and R, (O, ...).
        bias: whether to have b, and with it r and Gb.
        num_hyperparameters: n, at least 1.
        gated_dim: the dimension of W and R that is the outputs'.
        factors: the shapes of A and B; None for a full response.
    """

    response_projection: nn.Parameter | None

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        num_hyperparameters: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        gated_dim: int = 0,
        factors: Factors | None = None,
    ):
        super().__init__()
        self.num_hyperparameters = num_hyperparameters
        self.response_rank = None if factors is None else factors.rank
        outputs = weight_shape[gated_dim]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = parameter(*weight_shape)
        self.response_weight = parameter(*(weight_shape if factors is None else factors.response_weight))
        self.weight_gate = parameter(outputs, num_hyperparameters)
        self.bias: nn.Parameter | None = None
        self.response_bias: nn.Parameter | None = None
        self.bias_gate: nn.Parameter | None = None
        if bias:
            self.bias, self.response_bias = parameter(outputs), parameter(outputs)
            self.bias_gate = parameter(outputs, num_hyperparameters)
        self.response_projection = None if factors is None else parameter(*factors.response_projection)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight[0].numel())
        for uniform in (self.weight, self.bias):
            if uniform is not None:
                nn.init.uniform_(uniform, -bound, bound)
        start_response(self.response_weight, self.response_projection, bound)
        if self.response_bias is not None:
            nn.init.uniform_(self.response_bias, -bound, bound)
        for gate in (self.weight_gate, self.bias_gate):
            if gate is not None:
                nn.init.normal_(gate, std=0.01)

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖W + diag(Gw h[b]) R‖², a scalar; biases are not decayed."""
        h = response_input(hyper, self.weight)
        return functional.weight_decay_penalty(
            self.weight, self.response_weight, self.weight_gate, h, decay, self.response_projection
        )

    def _check_response(self, hyper: HyperBatch | Tensor) -> None:
        check_response(type(self).__name__, self.num_hyperparameters, hyper)

    @property
    def gated_parameters(self) -> GatedParameters:
        """W, b, R, r, Gw, Gb, or with A in the place of R and B behind them."""
        return GatedParameters(
            self.weight,
            self.bias,
            self.response_weight,
            self.response_bias,
            self.weight_gate,
            self.bias_gate,
            self.response_projection,
        )

    @property
    def _response_repr(self) -> list[str]:
        """How the response is shown in `repr`."""
        rank = [] if self.response_rank is None else [f"response_rank={self.response_rank}"]
        return [f"num_hyperparameters={self.num_hyperparameters}", *rank]

    @torch.no_grad()
    def _folded(self, response: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer this one is at one response input (n,)."""
        check_folding(self.num_hyperparameters, response)
        return fold(self.gated_parameters, response.to(self.weight))


def check_sizes(layer: str, **sizes: int) -> None:
    """Raises ValueError naming a size that isn't a whole number of at least 1."""
    for name, value in sizes.items():
        checks.whole_number(layer, name, value, 1)


def check_switches(layer: str, **switches: bool) -> None:
    """Raises ValueError naming what is neither True nor False, such as 'False', which would count as true."""
    for name, value in switches.items():
        checks.switch(layer, name, value)


def check_response(layer: str, num_hyperparameters: int, hyper: HyperBatch | Tensor) -> None:
    """Raises where a layer is called with other hyperparameters than it has gates for, or with something else."""
    if not isinstance(hyper, Tensor | HyperBatch):
        raise TypeError(f"{layer} wants a HyperBatch, or its response as a tensor; got {type(hyper).__name__}")
    n = (hyper if isinstance(hyper, Tensor) else hyper.response).shape[-1]
    if n != num_hyperparameters:
        raise ValueError(
            f"{layer} has num_hyperparameters={num_hyperparameters}; got {n} of them "
            "(num_hyperparameters=len(space) fits)"
        )


def check_folding(num_hyperparameters: int, response: Tensor) -> None:
    """Raises ValueError where a layer is folded at anything but one response input."""
    if response.shape != (num_hyperparameters,):
        raise ValueError(f"fold wants a response of shape ({num_hyperparameters},); got {tuple(response.shape)}")


def give_parameters(plain: nn.Linear | nn.Conv2d | nn.BatchNorm2d, weight: Tensor, bias: Tensor | None) -> None:
    """Makes them the parameters of a plain layer, which holds none of its own yet (device="meta")."""
    plain.weight = nn.Parameter(weight)
    plain.bias = None if bias is None else nn.Parameter(bias)
