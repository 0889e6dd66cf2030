"""What all gated operations share: their tensors, the gates and the gradients of these, folding, checks.

Every one of them is y = P + scale ⊙ Q + shift, with P and Q what the plain operation makes of W and of R, and for each
example scale = h Gwᵀ and shift = b + (h Gbᵀ) ⊙ r. A response of low rank is R = A B: the plain operation makes u of B,
which has few rows, and Q = A u.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from stn_fast.ops.casts import cast

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch


Factors: TypeAlias = tuple[Sequence[int], Sequence[int]]  # shapes of A and B


class GatedParameters(NamedTuple):
    """W, b, R, r, Gw, Gb of a gated layer with O outputs and n hyperparameters; b, r and Gb may be None together.

    A response of rank k is R = A B: `response_weight` is A and `response_projection` is B. For a full response
    `response_weight` is R and `response_projection` is None.

    Shapes: weight, R (O, ...); bias, response_bias (O,); weight_gate, bias_gate (O, n). In a linear layer A is (O, k)
    and B (k, I); in a convolution (O, k, 1, 1) and (groups·k, I/groups, kh, kw); in an embedding, where R = B Aᵀ, (D,
    k) and (V, k).
    """

    weight: Tensor
    bias: Tensor | None
    response_weight: Tensor
    response_bias: Tensor | None
    weight_gate: Tensor
    bias_gate: Tensor | None
    response_projection: Tensor | None = None

    @staticmethod
    def shapes(
        matrix: Sequence[int], outputs: int, n: int, factors: Factors | None = None
    ) -> tuple[Sequence[int], ...]:
        """Those of all, for W and R of shape ``matrix``, or with A and B of the shapes ``factors``.

        Where there are no factors, there is no response_projection, and no shape of it.
        """
        vector, gate = (outputs,), (outputs, n)
        response, *projection = factors or (matrix,)
        return matrix, vector, response, vector, gate, gate, *projection

    def to(self, dtype: torch.dtype) -> GatedParameters:
        """In another dtype, each cast once a step inside `casts_once`."""
        return GatedParameters._make([cast(tensor, dtype) for tensor in self])

    @property
    def whole_response(self) -> Tensor:
        """R, of the shape of W: A B, of each group, where it is of low rank. An embedding's is another."""
        factor, projection = self.response_weight, self.response_projection
        if projection is None:
            return factor
        groups = len(projection) // factor.shape[1]
        of_groups = factor.flatten(1).unflatten(0, (groups, -1)) @ projection.flatten(1).unflatten(0, (groups, -1))
        return of_groups.view(self.weight.shape)


class Gradients(NamedTuple):
    """The gradients of a gated operation: of x, of its `GatedParameters` and of h; None where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    response_weight: Tensor | None
    response_bias: Tensor | None
    weight_gate: Tensor | None
    bias_gate: Tensor | None
    response_projection: Tensor | None
    h: Tensor | None


class Wanted(NamedTuple):
    """Which of the `Gradients` to compute."""

    x: bool
    weight: bool
    bias: bool
    response_weight: bool
    response_bias: bool
    weight_gate: bool
    bias_gate: bool
    response_projection: bool
    h: bool

    @property
    def scale(self) -> bool:
        """Whether the gradient of h Gwᵀ is needed."""
        return self.weight_gate or self.h

    @property
    def shift(self) -> bool:
        """Whether the gradient of b + (h Gbᵀ) ⊙ r is needed, where there is one."""
        return self.bias or self.response_bias or self.bias_gate or self.h


class GateGradients(NamedTuple):
    """The gradients that follow from those of scale and shift."""

    bias: Tensor | None
    response_bias: Tensor | None
    weight_gate: Tensor | None
    bias_gate: Tensor | None
    h: Tensor | None


def fold(parameters: GatedParameters, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """The plain layer that a gated one is at a single h (n,): (W + diag(Gw h) R, b + (Gb h) ⊙ r); W, R (O, ...)."""
    weight, bias, _, response_bias, weight_gate, bias_gate, _ = parameters
    scale = (weight_gate @ h).view(-1, *[1] * (weight.ndim - 1))
    folded = torch.addcmul(weight, scale, parameters.whole_response)
    if bias is None or response_bias is None or bias_gate is None:
        return folded, None
    return folded, bias + (bias_gate @ h) * response_bias


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gates and sums over examples are computed: 16-bit numbers would be rounded twice."""
    return torch.promote_types(dtype, torch.float32)


def gates(parameters: GatedParameters, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """Every example's scale h Gwᵀ and shift b + (h Gbᵀ) ⊙ r, (B, O), in float32 or wider; no shift without bias."""
    _, bias, _, response_bias, weight_gate, bias_gate, _ = parameters
    dtype = wide(h.dtype)
    wide_h = h.to(dtype)
    scale = wide_h @ weight_gate.to(dtype).T
    if bias is None or response_bias is None or bias_gate is None:
        return scale, None
    return scale, torch.addcmul(bias.to(dtype), wide_h @ bias_gate.to(dtype).T, response_bias.to(dtype))


def gate_gradients(
    d_scale: Tensor | None, d_shift: Tensor | None, parameters: GatedParameters, h: Tensor, wanted: Wanted
) -> GateGradients:
    """What follows from the gradients of scale and shift, (B, O) in float32 or wider, None where not needed."""
    _, _, _, response_bias, weight_gate, bias_gate, _ = parameters
    given, dtype = h.dtype, wide(h.dtype)
    if dtype != given:
        h, weight_gate = h.to(dtype), weight_gate.to(dtype)
        response_bias, bias_gate = (None if t is None else t.to(dtype) for t in (response_bias, bias_gate))
    d_bias = d_response_bias = d_weight_gate = d_bias_gate = dh = None
    if d_scale is not None:
        d_weight_gate = d_scale.T @ h if wanted.weight_gate else None
        dh = d_scale @ weight_gate if wanted.h else None
    if d_shift is not None and response_bias is not None and bias_gate is not None:
        d_bias = d_shift.sum(0) if wanted.bias else None
        d_response_bias = (d_shift * (h @ bias_gate.T)).sum(0) if wanted.response_bias else None
        if wanted.bias_gate or dh is not None:
            d_gated = d_shift * response_bias
            d_bias_gate = d_gated.T @ h if wanted.bias_gate else None
            dh = torch.addmm(dh, d_gated, bias_gate) if dh is not None else None
    found = GateGradients(d_bias, d_response_bias, d_weight_gate, d_bias_gate, dh)
    return found if dtype == given else GateGradients(*(None if d is None else d.to(given) for d in found))


def response_input(hyper: HyperBatch | Tensor, like: Tensor) -> Tensor:
    """What the gates of a layer see: (B, n), or (n,) where a HyperBatch's examples share one row.

    A HyperBatch's float32 response is cast to the dtype of `like`; a tensor is taken as it is.
    """
    if isinstance(hyper, Tensor):
        return hyper
    if not hasattr(hyper, "response"):
        raise TypeError(
            f"a gated operation takes a HyperBatch, or its response as a tensor; got {type(hyper).__name__}"
        )
    response = hyper.response[0] if hyper.shared and len(hyper) else hyper.response
    return response.to(like.dtype)


def rows_are_cheaper(h: Tensor, *layers: GatedParameters) -> bool:
    """Whether one h (n,) for all examples should be expanded to a row per example instead of folded into the weights.

    Folded, the gradient of h is computed from the gradient of the weights, a product as large as the layer's own. With
    a low-rank response, rows only need small products.
    """
    asked = torch.is_grad_enabled() and h.requires_grad
    return asked and all(layer.response_projection is not None for layer in layers)


def check_examples(
    who: str, x: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0, others: Iterable[int] = ()
) -> None:
    """Raises ValueError where a HyperBatch has another number of examples than x; ``others`` could count them too."""
    in_range = -x.ndim <= example_dim < x.ndim
    if not isinstance(hyper, Tensor) and in_range and x.shape[example_dim] != len(hyper):
        fitting = [dim for dim in others if x.shape[dim] == len(hyper)]
        hint = f"; example_dim={fitting[0]} fits" if fitting else ""
        raise ValueError(
            f"{who}: the HyperBatch has {len(hyper)} examples, but x {tuple(x.shape)} has "
            f"{x.shape[example_dim]} in dimension {example_dim}{hint}"
        )


def gradients(
    of_gates: GateGradients,
    *,
    x: Tensor | None = None,
    weight: Tensor | None = None,
    response_weight: Tensor | None = None,
    response_projection: Tensor | None = None,
) -> Gradients:
    """`Gradients` from those of the gates and those of the large tensors."""
    bias, response_bias, weight_gate, bias_gate, h = of_gates
    return Gradients(x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, response_projection, h)


def rows_of(per_example: Tensor, outer: int, inner: int) -> Tensor:
    """(B, O) → (outer·B·inner, O): every example's row at each of its positions."""
    if outer == inner == 1:
        return per_example
    batch, outputs = per_example.shape
    return per_example[None, :, None].expand(outer, batch, inner, outputs).reshape(outer * batch * inner, outputs)


def sum_of_rows(per_row: Tensor, outer: int, batch: int, inner: int) -> Tensor:
    """(outer·B·inner, O) → (B, O): the sum over the positions of every example."""
    if outer == inner == 1:
        return per_row
    return per_row.view(outer, batch, inner, per_row.shape[1]).sum((0, 2))


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each as kernels read it."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# (name, tensor, its shape)
Expected = tuple[str, Tensor | None, Sequence[int]]


_NAMES = {side: tuple(side + name for name in GatedParameters._fields) for side in ("", "from_input.", "from_hidden.")}


def check_parameters(operation: str, parameters: GatedParameters, side: str = "") -> None:
    """Raises ValueError where one is missing; the biases' may be, all three together. ``side`` begins their names."""
    weight, bias, response_weight, response_bias, weight_gate, bias_gate, projection = parameters
    if weight is None or response_weight is None or weight_gate is None:
        missing = [name for name, tensor in zip(_NAMES[side][:6:2], parameters[:6:2], strict=True) if tensor is None]
        raise ValueError(f"{operation}: {missing[0]} must be a tensor, got None")
    if projection is not None and projection.ndim != weight.ndim:
        raise ValueError(
            f"{operation}: {side}response_projection must have as many dimensions as "
            f"{side}weight {tuple(weight.shape)}; got {tuple(projection.shape)}"
        )
    if projection is not None and response_weight.ndim > 1 and response_weight.shape[1] == 0:
        raise ValueError(
            f"{operation}: {side}response_weight and {side}response_projection must have a rank of at least 1; "
            f"got {tuple(response_weight.shape)} and {tuple(projection.shape)}"
        )
    if (bias is None) != (response_bias is None) or (bias is None) != (bias_gate is None):
        raise ValueError(f"{operation}: give bias, response_bias and bias_gate together, or none of them")


def expected(
    parameters: GatedParameters,
    matrix: Sequence[int],
    outputs: int,
    n: int,
    side: str = "",
    *,
    groups: int = 1,
    factors: Factors | None = None,
) -> list[Expected]:
    """What `check_operands` compares, for W and R of shape ``matrix``.

    A and B must have the shapes ``factors``; by default `factors_of` the matrix, with the rank of B.
    """
    projection = parameters.response_projection
    if factors is None and projection is not None:
        factors = factors_of(matrix, len(projection) // groups, groups)
    shapes = GatedParameters.shapes(matrix, outputs, n, factors)
    return list(zip(_NAMES[side], parameters, shapes, strict=False))


def factors_of(matrix: Sequence[int], rank: int, groups: int = 1) -> Factors:
    """The shapes of A and B, R = A B in each group, for W and R (O, ...) of shape ``matrix``."""
    outputs, *of_output = matrix
    return (outputs, rank, *[1] * (len(of_output) - 1)), (groups * rank, *of_output)


def response_is_read(h: Tensor, *layers: GatedParameters) -> bool:
    """Whether backward will read what forward computes of the response: for dh, dGw, or dA of a low rank."""
    readers = [h, *(layer.weight_gate for layer in layers)]
    readers += [layer.response_weight for layer in layers if layer.response_projection is not None]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in readers)


def check_operands(
    operation: str,
    operands: Iterable[Expected],
    weight: Tensor,
    weight_name: str = "weight",
    /,
    **beside: Tensor | int,
) -> None:
    """Raises ValueError about the first of ``operands`` that doesn't fit; one that is None does.

    All are to be of one floating point dtype, that of ``weight``, and on its device. ``beside`` is what the shapes
    follow from.
    """
    dtype, device = weight.dtype, weight.device
    for name, tensor, shape in operands:
        if tensor is None:
            continue
        if tensor.shape != shape:
            given = [f"{key} {tuple(t.shape)}" if isinstance(t, Tensor) else f"{key}={t}" for key, t in beside.items()]
            raise ValueError(
                f"{operation}: {name} must be {tuple(shape)} to fit {', '.join(given[:-1])} and {given[-1]}; "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}, {weight_name} {weight.dtype} on "
                f"{weight.device}; they must agree (cast one: {name}.to({weight_name}))"
            )
    if not weight.is_floating_point():
        raise ValueError(f"{operation} takes floating point tensors; got {weight.dtype}")
