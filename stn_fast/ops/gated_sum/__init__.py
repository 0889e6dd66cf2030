"""gated_sum: what a gated layer adds up of the products that are already there, P + scale ⊙ Q + shift.

The tangent of a gated layer is such a sum, of products with two different inputs (`stn_fast.ops.tangents`).
"""

from __future__ import annotations

from torch import Tensor

from stn_fast.ops.gates import rows_of
from stn_fast.ops.memory import autocast_dtype
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations
from stn_fast.ops.transforms import in_transform

implementations = Implementations(__name__)


def reference(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    outer: int = 1,
    inner: int = 1,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    y = rows_of(h @ weight_gate.T, outer, inner) * q
    if response_bias is not None and bias_gate is not None:
        y = y + rows_of((h @ bias_gate.T) * response_bias, outer, inner)
    return y if p is None else p + y


def _forward(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    outer: int,
    inner: int,
) -> Tensor:
    module = implementations.serving(q, h)
    return module.forward(q, weight_gate, response_bias, bias_gate, h, p, outer, inner)


def _check_sizes(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None,
    outer: int,
    inner: int,
) -> None:
    if len(q) != outer * len(h) * inner or (p is not None and p.shape != q.shape):
        raise ValueError(f"gated_sum: q {tuple(q.shape)} is not {outer} x {inner} positions of h {tuple(h.shape)}")


def _fake(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


def _backward(
    d_y: Tensor,
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    outer: int,
    inner: int,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    module = implementations.serving(q, h)
    return module.backward(d_y.contiguous(), q, weight_gate, response_bias, bias_gate, h, outer, inner, wanted)


_operation = Operation(
    "gated_sum",
    _forward,
    outputs=("y",),
    fake=_fake,
    backward=_backward,
    differentiable=("q", "weight_gate", "response_bias", "bias_gate", "h"),
    check=_check_sizes,
    passed={"p": "y"},
)


def gated_sum(
    q: Tensor,
    weight_gate: Tensor,
    response_bias: Tensor | None,
    bias_gate: Tensor | None,
    h: Tensor,
    p: Tensor | None = None,
    *,
    outer: int = 1,
    inner: int = 1,
) -> Tensor:
    """y = P + (h Gwᵀ) ⊙ Q + (h Gbᵀ) ⊙ r

    Args:
        q, p: Q and P (outer·B·inner, O), rows of positions; row m belongs to example (m // inner) mod B. No P is 0.
        weight_gate, bias_gate: Gw, Gb (O, n); bias_gate is None when response_bias is.
        response_bias: r (O,), or None for a layer without bias.
        h: (B, n).
        outer, inner: positions of an example before and after the dimension that counts examples.

    All tensors are of one floating point dtype and on one device; under autocast all are cast to that of Q.

    Returns:
        (outer·B·inner, O), like Q.
    """
    if autocast_dtype(q):
        weight_gate, h = weight_gate.to(q.dtype), h.to(q.dtype)
        response_bias, bias_gate, p = (None if t is None else t.to(q.dtype) for t in (response_bias, bias_gate, p))
    if in_transform():
        return reference(q, weight_gate, response_bias, bias_gate, h, p, outer, inner)
    operands = (q, weight_gate, response_bias, bias_gate, h, p)
    return _operation(*[None if t is None else t.contiguous() for t in operands], outer, inner)
