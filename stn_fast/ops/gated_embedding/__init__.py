"""gated_embedding: a table of word vectors that responds to each example's hyperparameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast.ops import tangents
from stn_fast.ops.draw import check_coordinates, check_stream
from stn_fast.ops.dropout import dropout
from stn_fast.ops.gated_embedding import plain
from stn_fast.ops.gated_sum import gated_sum
from stn_fast.ops.gates import (
    GatedParameters,
    Wanted,
    check_examples,
    check_operands,
    check_parameters,
    contiguous,
    expected,
    response_input,
)
from stn_fast.ops.linear import linear
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import Implementations
from stn_fast.ops.transforms import in_transform, traced
from stn_fast.ops.uncast import product

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch

implementations = Implementations(__name__)
_NO_PADDING = -1


def reference(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None = None,
    outer: int = 1,
    inner: int = 1,
    padding: int = _NO_PADDING,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it.

    tokens (outer·B·inner,) are positions; position m belongs to example (m // inner) mod B of h (B, n).
    """
    return plain.forward(tokens, parameters, h, scale, outer, inner, padding)


def fold(parameters: GatedParameters, h: Tensor) -> Tensor:
    """The plain table (V, D) that a gated one is at a single h (n,): E + R diag(Gw h)."""
    response, projection = parameters.response_weight, parameters.response_projection
    if projection is not None:
        response = projection @ response.T
    return torch.addcmul(parameters.weight, response, parameters.weight_gate @ h)


def row_scale(words: int, rate: Tensor, step: Tensor, seed: int, stream: int) -> Tensor:
    """(V,) float32: [u ≥ rate] / (1 − rate), u drawn for every word from (seed, step, stream); rate is (1,).

    The example of the draw is 0 whatever part of the global batch this is: a word is dropped everywhere or nowhere.
    """
    return dropout(rate.new_ones(1, words), rate, seed=seed, step=step, stream=stream)[0]


def _check_range(tokens: Tensor, words: int) -> None:
    """On CUDA the device stops by itself, later, as it does for torch.nn.Embedding."""
    if tokens.numel() == 0:
        return
    low, high = tokens.aminmax()
    if tokens.is_cuda:
        torch._assert_async((low >= 0) & (high < words), "gated_embedding: a token is outside of the table")
    elif low < 0 or high >= words:
        wrong = int(low) if low < 0 else int(high)
        raise IndexError(f"gated_embedding: the table has {words} rows, so tokens are 0 to {words - 1}; got {wrong}")


def _forward(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    rate: Tensor | None,
    step: Tensor | None,
    seed: int,
    stream: int,
    outer: int,
    inner: int,
    padding: int,
    sparse: bool,
) -> Tensor:
    module = implementations.serving(parameters.weight, tokens, h)
    if not (tokens.is_cuda and module.checks_tokens):
        _check_range(tokens, len(parameters.weight))
    scale = None if rate is None or step is None else row_scale(len(parameters.weight), rate, step, seed, stream)
    return module.forward(tokens, parameters, h, scale, outer, inner, padding)


def _check_sizes(tokens: Tensor, parameters: GatedParameters, h: Tensor, *rest: Any) -> None:
    _, _, _, _, outer, inner, *_ = rest
    if len(tokens) != outer * len(h) * inner:
        raise ValueError(f"gated_embedding: {len(tokens)} tokens are not {outer * inner} for each of {len(h)} examples")


def _fake(tokens: Tensor, parameters: GatedParameters, *rest: Any) -> Tensor:
    return parameters.weight.new_empty(tokens.shape[0], parameters.weight.shape[1])


def _backward(
    d_e: Tensor,
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    rate: Tensor | None,
    step: Tensor | None,
    seed: int,
    stream: int,
    outer: int,
    inner: int,
    padding: int,
    sparse: bool,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """Of the tables where they are `sparse`: a row for each position."""
    words = len(parameters.response_weight)
    scale = None if rate is None or step is None else row_scale(words, rate, step, seed, stream)
    module = plain if sparse else implementations.serving(parameters.response_weight, tokens, h)
    operands = (d_e.contiguous(), tokens, parameters, h, scale, outer, inner, padding)
    return module.backward(*operands, sparse, Wanted(False, *wanted))[1:]


def _like(d_e: Tensor, tokens: Tensor, parameters: GatedParameters, h: Tensor, *rest: Any) -> list[Tensor | None]:
    *_, sparse, _ = rest
    table = d_e if sparse else parameters.response_weight
    return [table, None, table, None, parameters.weight_gate, None, None, h]


def _finish(gradients: list[Tensor | None], kept: tuple[Tensor, ...], options: list[Any]) -> list[Tensor | None]:
    """The gradients of the tables as sparse tensors, where they are to be."""
    tokens, _, _, table, *_ = kept
    *_, padding, sparse = options
    if sparse:
        gradients[1], gradients[3] = (_as_sparse(gradients[i], tokens, table, padding) for i in (1, 3))
    return gradients


def _as_sparse(rows: Tensor | None, tokens: Tensor, table: Tensor, padding: int) -> Tensor | None:
    """A gradient of the table (V, D) from what each position contributes (positions, D), as torch.nn.Embedding's."""
    if rows is None:
        return None
    kept = tokens != padding
    return torch.sparse_coo_tensor(tokens[kept][None], rows[kept], tuple(table.shape), check_invariants=False)


_operation = Operation(
    "gated_embedding",
    _forward,
    outputs=("e",),
    fake=_fake,
    backward=_backward,
    differentiable=("parameters", "h"),
    check=_check_sizes,
    unread=("weight", "bias"),
    fake_backward=_like,
    finish=_finish,
)


def gated_embedding(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    hyper: HyperBatch | Tensor,
    *,
    example_dim: int = 0,
    padding_idx: int | None = None,
    sparse: bool = False,
    rate: Tensor | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    stream: int = 1,
    response_projection: Tensor | None = None,
) -> Tensor:
    """Word vectors that respond to hyperparameters, every example to its own (MacKay et al., 2019).

    e = m[t] (E[t] + (h Gwᵀ) ⊙ R[t])

    m is 1, or with a `rate` [u[t] ≥ rate] / (1 − rate), u ~ U[0, 1) for every word t: embedding dropout, which drops
    a word's rows of E and R together and everywhere in the batch (Gal and Ghahramani, 2016). Nothing is stored of it
    for backward, which draws it again.

    Args:
        tokens: (...) int64 or int32, numbers of rows; dimension `example_dim` counts the B examples, all others are
            positions of an example.
        weight, response_weight: E, R (V, D).
        weight_gate: Gw (D, n).
        hyper: a HyperBatch, or its response input h, (B, n) with one row an example, or (n,) shared by all of them.
        padding_idx: a row that is looked up as any other, and of E and R gets no gradient; as in torch.nn.Embedding.
        sparse: whether the gradients of E and R are sparse tensors, as torch.nn.Embedding's are with sparse=True.
            The optimizer has to take them, and torch.compile does not.
        rate: (1,) float32 in [0, 1]; not looked at, which would wait for the device.
        seed, step, stream: fix the draw of u; step may be a 0-dim int64 tensor. They matter where there is a rate.
        response_projection: B (V, k) of a response R = B Aᵀ of rank k, whose A (D, k) is response_weight. None if
            response_weight is R. Padding, dropout and sparse gradients apply to the rows of E and B.

    All floating point tensors are of one dtype: float32, float64, bfloat16 or float16; autocast leaves them alone, as
    it does torch.nn.Embedding. Gradients are computed only for inputs that require one. Forward-mode AD and
    torch.compile are supported; second derivatives in reverse mode are not, and raise.

    Returns:
        (..., D), on the device of weight and of its dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
        IndexError: a token is no row of the table. On CUDA a device-side assertion stops the process instead.
    """
    parameters = GatedParameters(weight, None, response_weight, None, weight_gate, None, response_projection)
    check_parameters("gated_embedding", parameters)
    h = response_input(hyper, weight)
    direction = tangents.direction_of(hyper, *parameters)
    h = h if direction is None else direction
    check_examples("gated_embedding", tokens, hyper, example_dim, range(tokens.ndim))
    _check(tokens, parameters, h, example_dim, padding_idx)
    at = None
    if rate is not None:
        if rate.shape != (1,) or rate.dtype != torch.float32 or rate.requires_grad:
            raise ValueError(
                f"gated_embedding takes rate (1,) float32 without a gradient; got {tuple(rate.shape)} {rate.dtype}, "
                f"requires_grad={rate.requires_grad}"
            )
        stream = check_stream("gated_embedding", stream)
        at, seed, _ = check_coordinates("gated_embedding", weight.device, seed, step, 0)
    padding = _NO_PADDING if padding_idx is None else padding_idx % len(weight)
    example_dim %= max(1, tokens.ndim)
    outer, inner = math.prod(tokens.shape[:example_dim]), math.prod(tokens.shape[example_dim + 1 :])
    if h.ndim == 1:  # every position is one of a single example
        h, outer, inner = h[None], tokens.numel(), 1
    rows = tokens.reshape(-1).long()
    if direction is not None or (tangents.is_centred(hyper) and not in_transform()):
        if not traced(rows, weight):
            _check_range(rows, len(weight))
        scale = None if rate is None or at is None else row_scale(len(weight), rate, at, seed, stream)
        lookup = (scale, padding, sparse)
        if direction is None:
            e = _looked_up(rows, weight, *lookup)
        else:
            e = _dual(rows, parameters, direction, *lookup, outer=outer, inner=inner)
    elif in_transform():
        scale = None if rate is None or at is None else row_scale(len(weight), rate, at, seed, stream)
        e = reference(rows, parameters, h, scale, outer, inner, padding)
    elif response_projection is not None:
        if not traced(rows, weight):
            _check_range(rows, len(weight))
        scale = None if rate is None or at is None else row_scale(len(weight), rate, at, seed, stream)
        e = _of_low_rank(rows, parameters, h, scale, outer, inner, padding, sparse)
    else:
        operands = contiguous(rows, *parameters, h)
        e = _operation(*operands, rate, at, seed, stream, outer, inner, padding, sparse)
    return e.view(*tokens.shape, weight.shape[1])


def _dual(
    tokens: Tensor,
    parameters: GatedParameters,
    direction: Tensor,
    scale: Tensor | None,
    padding: int,
    sparse: bool,
    *,
    outer: int,
    inner: int,
) -> Tensor:
    """E[t], with its tangent along a change of h from 0."""
    projection = parameters.response_projection
    table = parameters.response_weight if projection is None else projection
    device = table.device.type
    with tangents.paused(), torch.autocast(device, enabled=False):
        e, q = (_looked_up(tokens, rows, scale, padding, sparse) for rows in (parameters.weight, table))
        q = q if projection is None else linear(q, parameters.response_weight)
        de = gated_sum(q, parameters.weight_gate, None, None, direction, outer=outer, inner=inner)
    return tangents.dual(e, de)


def _of_low_rank(
    tokens: Tensor,
    parameters: GatedParameters,
    h: Tensor,
    scale: Tensor | None,
    outer: int,
    inner: int,
    padding: int,
    sparse: bool,
) -> Tensor:
    """Two lookups, E[t] and u = B[t], and E[t] + (h Gwᵀ) ⊙ (u Aᵀ)."""
    _, _, factor, _, weight_gate, _, projection = parameters
    assert projection is not None
    e, u = (_looked_up(tokens, table, scale, padding, sparse) for table in (parameters.weight, projection))
    with torch.autocast(e.device.type, enabled=False):
        return gated_sum(product(u, factor.T), weight_gate, None, None, h, e, outer=outer, inner=inner)


def _looked_up(tokens: Tensor, table: Tensor, scale: Tensor | None, padding: int, sparse: bool) -> Tensor:
    """Rows of a table, each multiplied by its word's scale."""
    rows = F.embedding(tokens, table, None if padding < 0 else padding, sparse=sparse)
    if scale is None:
        return rows
    of_row = scale[tokens].to(rows.dtype)[:, None]
    return torch.where(of_row == 0, 0, rows) * of_row


def _check(tokens: Tensor, parameters: GatedParameters, h: Tensor, example_dim: int, padding_idx: int | None) -> None:
    weight = parameters.weight
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim < 1 or tokens.device != weight.device:
        raise ValueError(
            f"gated_embedding takes tokens as int64 or int32 of at least one dimension on {weight.device}; "
            f"got {tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
        )
    if weight.ndim != 2 or h.ndim not in (1, 2) or not weight.is_floating_point():
        raise ValueError(
            "gated_embedding takes weight (V, D) in floating point and h (B, n) or (n,); "
            f"got weight {tuple(weight.shape)} {weight.dtype}, h {tuple(h.shape)}"
        )
    if not -tokens.ndim <= example_dim < tokens.ndim:
        raise ValueError(f"gated_embedding: example_dim={example_dim} is no dimension of tokens {tuple(tokens.shape)}")
    words, n = weight.shape[0], h.shape[-1]
    if padding_idx is not None and not -words <= padding_idx < words:
        raise ValueError(f"gated_embedding: padding_idx={padding_idx} is no row of weight {tuple(weight.shape)}")
    factors = None
    if parameters.response_projection is not None:
        rank = parameters.response_projection.shape[1]
        factors = (weight.shape[1], rank), (words, rank)
    operands = (
        *expected(parameters, weight.shape, weight.shape[1], n, factors=factors),
        ("h", h, (tokens.shape[example_dim], n) if h.ndim == 2 else (n,)),
    )
    check_operands("gated_embedding", operands, weight, tokens=tokens, weight=weight, h=h, example_dim=example_dim)
