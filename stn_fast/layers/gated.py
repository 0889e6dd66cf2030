"""The base classes of gated layers: parameters, initialisation, weight decay and folding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stn_fast import checks, functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.gates import Factors, GatedParameters, factors_of, fold, response_input
from stn_fast.ops.tangents import direction_of, is_centred

AUTO_OVERHEAD = 0.05  # response_rank="auto" adds at most this fraction of the plain layer's multiplications


def factors_to_use(layer: str, response_rank: ResponseRank, matrix: Sequence[int], groups: int = 1) -> Factors | None:
    """The shapes of A and B of a layer's response R = A B; None for a full one.

    Args:
        layer: name for the error message.
        response_rank: the user's choice: k; "auto" for the largest k, at least 1, whose A and B have at most
            AUTO_OVERHEAD times as many entries as W, and so as many multiplications; None for a full response. If A and
            B would have as many entries as W or more, the response is full.
        matrix: shape of W (O, ...).
        groups: of a convolution.

    Raises:
        ValueError: response_rank is none of these.
    """
    if response_rank is None:
        return None
    whole, each = math.prod(matrix), sum(map(math.prod, factors_of(matrix, 1, groups)))
    if response_rank == "auto":
        response_rank = max(1, int(AUTO_OVERHEAD * whole / each))
    checks.whole_number(layer, "response_rank", response_rank, 1, otherwise=", 'auto' or None for full rank")
    return factors_of(matrix, response_rank, groups) if response_rank * each < whole else None


def start_response(response_weight: Tensor, projection: Tensor | None, bound: float) -> None:
    """Initialises R to 0; with a low rank, A to 0 and B uniformly in ±bound, like W."""
    nn.init.zeros_(response_weight)
    if projection is not None:
        nn.init.uniform_(projection, -bound, bound)


@torch.no_grad()
def start_gate(gate: Tensor) -> None:
    """Initialises a gate (O, n): output o responds only to hyperparameter o mod n, with s = h[:, o mod n].

    With gates that mix all hyperparameters, R would be a mixture of the responses to them, and the hypergradient of
    one that matters little would be lost in those of the others. With O < n, which leaves none for some, gates are
    drawn from N(0, 1/n).
    """
    outputs, n = gate.shape
    if outputs < n:
        nn.init.normal_(gate, std=1 / math.sqrt(n))
    else:
        gate.zero_()[torch.arange(outputs), torch.arange(outputs) % n] = 1


class Gated(nn.Module):
    """What all modules with gated parameters share: weight decay, folding, and loading of a state.

    They have `weight`, `response_weight` and `weight_gate`, and may have the others of `GatedParameters`.
    """

    weight: Tensor
    response_weight: Tensor
    weight_gate: Tensor
    response_projection: Tensor | None
    num_hyperparameters: int
    response_rank: int | None
    groups = 1  # of a convolution

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖W + diag(Gw h[b]) R‖², a scalar; biases are not decayed."""
        return decay_penalty(
            self.weight,
            self.response_weight,
            self.weight_gate,
            hyper,
            decay,
            self.response_projection,
            self.groups,
        )

    def _check_response(self, hyper: HyperBatch | Tensor) -> None:
        check_response(type(self).__name__, self.num_hyperparameters, hyper)

    @property
    def gated_parameters(self) -> GatedParameters:
        """W, b, R, r, Gw, Gb; with a low rank, A in place of R, and B last."""
        return GatedParameters._make(getattr(self, name, None) for name in GatedParameters._fields)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As torch's; adds which rank was stored to the error about a response of another one."""
        stored = state_dict.get(f"{prefix}response_weight")
        if isinstance(stored, Tensor) and stored.shape != self.response_weight.shape:
            rank = stored.shape[1] if f"{prefix}response_projection" in state_dict else None
            if rank != self.response_rank:
                layer = f"{type(self).__name__} {prefix.rstrip('.')}".rstrip()
                errors.append(f"{layer} has response_rank={self.response_rank}, but a state of {rank} is to be loaded")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    @property
    def _response_repr(self) -> list[str]:
        """How the response is shown in `repr`."""
        rank = [] if self.response_rank is None else [f"response_rank={self.response_rank}"]
        return [f"num_hyperparameters={self.num_hyperparameters}", *rank]

    @torch.no_grad()
    def _folded(self, response: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the plain layer that this one equals at one response input (n,)."""
        check_folding(self.num_hyperparameters, response)
        return fold(self.gated_parameters, response.to(self.weight))


class GatedLayer(Gated):
    """W, b, their responses R, r and the gates Gw, Gb of a layer with O outputs and n hyperparameters.

    W and b are initialised uniformly in ±1/√fan_in, R and r to 0, and the gates such that output o responds to
    hyperparameter o mod n: the layer starts as a plain one, and R learns at once. As published, R and r are random and
    the gates from N(0, 0.01²); the gradient of R is proportional to the gates, so R then hardly changes. With factors,
    R = A B has a low rank: `response_weight` is A, initialised to 0, and `response_projection` is B, initialised like
    W.

    Args:
        weight_shape: shape of W and R, (O, ...).
        bias: whether to have b, r and Gb.
        num_hyperparameters: n, at least 1.
        gated_dim: the output dimension of W and R.
        factors: the shapes of A and B; None for a full response.
    """

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
        self.response_rank = None if factors is None else factors[0][1]
        outputs = weight_shape[gated_dim]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = parameter(*weight_shape)
        self.response_weight = parameter(*(weight_shape if factors is None else factors[0]))
        self.weight_gate = parameter(outputs, num_hyperparameters)
        self.bias: nn.Parameter | None = None
        self.response_bias: nn.Parameter | None = None
        self.bias_gate: nn.Parameter | None = None
        if bias:
            self.bias, self.response_bias = parameter(outputs), parameter(outputs)
            self.bias_gate = parameter(outputs, num_hyperparameters)
        self.response_projection = None if factors is None else parameter(*factors[1])
        self.reset_parameters()

    @property
    def bound(self) -> float:
        """W and b are initialised uniformly in ±bound."""
        return 1 / math.sqrt(self.weight[0].numel())

    def reset_parameters(self) -> None:
        bound = self.bound
        for uniform in (self.weight, self.bias):
            if uniform is not None:
                nn.init.uniform_(uniform, -bound, bound)
        start_response(self.response_weight, self.response_projection, bound)
        if self.response_bias is not None:
            nn.init.zeros_(self.response_bias)
        for gate in (self.weight_gate, self.bias_gate):
            if gate is not None:
                start_gate(gate)


def decay_penalty(
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    hyper: HyperBatch | Tensor,
    decay: Tensor,
    response_projection: Tensor | None,
    groups: int = 1,
) -> Tensor:
    """`functional.weight_decay_penalty` at a HyperBatch; along the direction of one that asks for tangents.

    The penalty is not linearised: the weights are linear in the response already.
    """
    direction = direction_of(hyper, weight)
    if direction is None and is_centred(hyper) and len(decay):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return 0.5 * decay.to(wide.dtype).mean() * wide.square().sum()
    h = response_input(hyper, weight) if direction is None else direction
    return functional.weight_decay_penalty(weight, response_weight, weight_gate, h, decay, response_projection, groups)


def check_sizes(layer: str, **sizes: int) -> None:
    """Raises ValueError naming a size that isn't a whole number of at least 1."""
    for name, value in sizes.items():
        checks.whole_number(layer, name, value, 1)


def check_switches(layer: str, **switches: bool) -> None:
    """Raises ValueError naming an argument that is not a bool, such as the text 'False', which would count as true."""
    for name, value in switches.items():
        checks.switch(layer, name, value)


def check_response(layer: str, num_hyperparameters: int, hyper: HyperBatch | Tensor) -> None:
    """Raises if ``hyper`` is no HyperBatch or response, or has another number of hyperparameters than the layer."""
    if not isinstance(hyper, Tensor | HyperBatch):
        raise TypeError(f"{layer}: hyper must be a HyperBatch, or its response as a tensor, got {type(hyper).__name__}")
    n = (hyper if isinstance(hyper, Tensor) else hyper.response).shape[-1]
    if n != num_hyperparameters:
        raise ValueError(
            f"{layer} has num_hyperparameters={num_hyperparameters}, but hyper has {n} "
            "(build the layer with num_hyperparameters=len(space))"
        )


def check_folding(num_hyperparameters: int, response: Tensor) -> None:
    """Raises ValueError if ``response`` is not one response input."""
    if response.shape != (num_hyperparameters,):
        raise ValueError(f"fold: response must have shape ({num_hyperparameters},), got {tuple(response.shape)}")


def give_parameters(plain: nn.Linear | nn.Conv2d | nn.BatchNorm2d, weight: Tensor, bias: Tensor | None) -> None:
    """Sets the parameters of a plain layer that was built on the meta device."""
    plain.weight = nn.Parameter(weight)
    plain.bias = None if bias is None else nn.Parameter(bias)
