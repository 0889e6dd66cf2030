"""Weight decay of a layer whose weights differ from example to example, in closed form."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stn_fast.dispatch import triton_may_serve
from stn_fast.ops.gates import factors_of
from stn_fast.ops.memory import reads_memory
from stn_fast.ops.serving import ELEMENTWISE, UP_TO_FLOAT32, serving
from stn_fast.ops.transforms import in_transform, traced
from stn_fast.ops.uncast import product

LAST = torch.channels_last


def weight_decay_penalty(
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    decay: Tensor,
    response_projection: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """½ · mean over examples of decay[b] · ‖W + diag(Gw h[b]) R‖², without building the weights of any example.

    With a_o = ‖W_o‖², c_o = ⟨W_o, R_o⟩, q_o = ‖R_o‖² and s = h Gwᵀ, example b has ‖W_eff‖² = Σ_o a_o + 2 s_bo c_o +
    s_bo² q_o. The examples are only needed in the moments Σ_b decay[b], Σ_b decay[b] h[b] and Σ_b decay[b] h[b] h[b]ᵀ,
    so the cost does not grow with B·O.

    Args:
        weight, response_weight: (O, ...); all dimensions after the first are flattened.
        weight_gate: (O, n).
        h: (B, n), or (n,) shared by all examples.
        decay: (B,), in torch's convention: the gradient of the penalty with respect to W is decay · W.
        response_projection: for a response of low rank, B (groups·k, ...), with A (O, k, ...) as response_weight and
            R = A B in each group. R is not built: ⟨W_o, R_o⟩ = ⟨A_o, B W_o⟩ and ‖R_o‖² = ⟨A_o, B Bᵀ A_o⟩.
        groups: of a convolution.

    Returns:
        A scalar, float32 (float64 for a float64 weight) even under autocast; differentiable with respect to every
        argument.

    Raises:
        ValueError: the shapes do not fit together, or the batch is empty.
    """
    outputs, n = weight_gate.shape
    h = h.expand(decay.shape[0], n) if h.ndim == 1 else h
    fits = _responds(weight, response_weight, response_projection, groups)
    if not fits or weight.shape[0] != outputs or h.shape != (decay.shape[0], n):
        factor = "" if response_projection is None else f", response_projection {tuple(response_projection.shape)}"
        raise ValueError(
            "weight_decay_penalty needs weight and response_weight (O, ...), weight_gate (O, n), h (B, n) and "
            f"decay (B,), got {tuple(weight.shape)}, {tuple(response_weight.shape)}, {tuple(weight_gate.shape)}, "
            f"{tuple(h.shape)}, {tuple(decay.shape)}{factor}"
        )
    if len(decay) == 0:
        raise ValueError("weight_decay_penalty needs at least one example, got an empty batch")
    if response_projection is not None:
        return _plain(weight, response_weight, weight_gate, h, decay, response_projection)
    if _kernels_serve(weight, response_weight, weight_gate, h, decay):
        rows = weight.flatten(1).contiguous(), response_weight.flatten(1).contiguous()
        return _Penalty.apply(*rows, *(t.contiguous() for t in (weight_gate, h, decay)))
    return _plain(weight, response_weight, weight_gate, h, decay)


def _responds(weight: Tensor, response_weight: Tensor, projection: Tensor | None, groups: int) -> bool:
    """Whether the response has the shape of W, or has factors that fit it."""
    if projection is None:
        return weight.shape == response_weight.shape
    rank = response_weight.flatten(1).shape[1]
    factors = factors_of(weight.shape, rank, groups)
    return rank > 0 and len(weight) % groups == 0 and (response_weight.shape, projection.shape) == factors


def _plain(
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    decay: Tensor,
    projection: Tensor | None = None,
) -> Tensor:
    batch = len(decay)
    # 16-bit tensors are widened, because these are sums of many squares.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, response_weight, *others = (tensor.to(dtype) for tensor in _rows(weight, response_weight, projection))
    weight_gate, h, decay = weight_gate.to(dtype), h.to(dtype), decay.to(dtype)
    weighted = decay[:, None] * h
    mean_gate = (weight_gate * weighted.sum(0)).sum(1) / batch
    mean_square_gate = (product(weight_gate, product(h.T, weighted)) * weight_gate).sum(1) / batch
    moments = decay.mean(), mean_gate, mean_square_gate
    if others and not (in_transform() or traced(weight)):
        return _OfFactors.apply(weight, response_weight, *others, *moments)
    inner, square = _inner_products(weight, response_weight, *others)
    return _total(weight.square().sum(), inner, square, *moments)


def _rows(weight: Tensor, response_weight: Tensor, projection: Tensor | None) -> Iterator[Tensor]:
    """W, R and, if there is one, B as matrices; filters in channels_last as they are stored, without a copy of W."""
    in_last = weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=LAST)
    for tensor in (weight, response_weight) if projection is None else (weight, response_weight, projection):
        yield (tensor.permute(0, 2, 3, 1) if in_last else tensor).flatten(1)


def _total(squares: Tensor, inner: Tensor, square: Tensor, decay: Tensor, gate: Tensor, square_gate: Tensor) -> Tensor:
    """½ (decay ‖W‖² + Σ_o 2 gate_o ⟨W_o, R_o⟩ + square_gate_o ‖R_o‖²), squares = ‖W‖²"""
    return 0.5 * (decay * squares + (2 * gate * inner + square_gate * square).sum())


def _inner_products(weight: Tensor, response_weight: Tensor, projection: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """⟨W_o, R_o⟩ and ‖R_o‖² of every output o; with a projection B, R = A B in each group."""
    if projection is None:
        return (weight * response_weight).sum(1), response_weight.square().sum(1)
    w, a, b = _grouped(weight, response_weight, projection)
    of_weight, of_response = _products(w, a, b)
    return _by_output(a, of_weight), _by_output(a, of_response)


def _grouped(weight: Tensor, factor: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (O, I), A (O, k) and B (groups·k, I), with the group as their first dimension."""
    groups = len(projection) // factor.shape[1]
    w, a, b = (tensor.reshape(groups, -1, tensor.shape[1]) for tensor in (weight, factor, projection))
    return w, a, b


def _products(w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """W Bᵀ and A B Bᵀ, whose products with A, row by row, are ⟨W_o, R_o⟩ and ‖R_o‖²."""
    return product(w, b.mT), product(a, product(b, b.mT))


def _by_output(a: Tensor, of: Tensor) -> Tensor:
    """Sums of products of rows: (groups, O / groups, k) twice → (O,)"""
    return (a * of).sum(2).reshape(-1)


class _OfFactors(torch.autograd.Function):
    """`_total` of a response R = A B, with few passes over W."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factor: Tensor, projection: Tensor, decay: Tensor, gate: Tensor, square_gate: Tensor
    ) -> Tensor:
        w, a, b = _grouped(weight, factor, projection)
        of_weight, of_response = _products(w, a, b)
        squares = torch.linalg.vector_norm(weight).square()
        ctx.save_for_backward(weight, factor, projection, decay, gate, square_gate, of_weight, of_response, squares)
        return _total(squares, _by_output(a, of_weight), _by_output(a, of_response), decay, gate, square_gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, factor, projection, decay, gate, square_gate, of_weight, of_response, squares = ctx.saved_tensors
        (g,) = gradients
        w, a, b = _grouped(weight, factor, projection)
        if torch.is_grad_enabled():  # to be differentiated again, by its operands
            (of_weight, of_response), squares = _products(w, a, b), weight.square().sum()
        m, q = (g * of.reshape(len(w), -1, 1) for of in (gate, square_gate))
        wanted = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            # In the memory order of W, which its other gradients have, too.
            d_weight = product(b.mT, (m * a).mT).mT if weight.stride(0) == 1 else product(m * a, b)
            found[0] = d_weight.addcmul_(w, g * decay).reshape(weight.shape)
        if wanted[1]:
            found[1] = torch.addcmul(m * of_weight, q, of_response).reshape(factor.shape)
        if wanted[2]:
            found[2] = (product((m * a).mT, w) + product(product((q * a).mT, a), b)).reshape(projection.shape)
        if wanted[3]:
            found[3] = 0.5 * g * squares
        if wanted[4]:
            found[4] = g * _by_output(a, of_weight)
        if wanted[5]:
            found[5] = 0.5 * g * _by_output(a, of_response)
        return tuple(found)


def _kernels_serve(*tensors: Tensor) -> bool:
    """Whether kernels can compute it: h and decay must not need a gradient, as kernels only have those of W, R, Gw."""
    if traced(*tensors) or not triton_may_serve() or in_transform():
        return False
    weight, _, _, h, decay = tensors
    small = all(t.dtype in UP_TO_FLOAT32 for t in tensors)
    constant = not (torch.is_grad_enabled() and (h.requires_grad or decay.requires_grad))
    if not (small and constant and serving(weight, takes=ELEMENTWISE) == "triton"):
        return False
    from stn_fast.kernels.gates import MAX_N

    return 0 < h.shape[1] <= MAX_N


class _Penalty(torch.autograd.Function):
    """The penalty by kernels; second derivatives are computed by plain torch."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        penalty, rows, moments = _forward(*tensors)
        ctx.save_for_backward(*tensors, rows, moments)
        return penalty.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, rows, moments = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            return *_backward(gradients[0], *tensors[:3], rows, moments, wanted), None, None
        asked = [tensor for tensor, wants in zip(tensors[:3], wanted, strict=True) if wants]
        found = iter(torch.autograd.grad(_plain(*tensors), asked, gradients[0], create_graph=True))
        return *(next(found) if wants else None for wants in wanted), None, None


@reads_memory
def _forward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from stn_fast.kernels import weight_decay as kernels

    return kernels.forward(*tensors)


@reads_memory
def _backward(*arguments: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    from stn_fast.kernels import weight_decay as kernels

    return kernels.backward(*arguments)
