"""gated_embedding: a table of word vectors that responds to each example's hyperparameters."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stn_fast.ops._draw import check_coordinates, check_stream
from stn_fast.ops._eager import eager_function, register, traced
from stn_fast.ops._gated_embedding_cpu import backward_core, forward_core
from stn_fast.ops._gated_embedding_plain import Wanted, backward_plain, forward_plain
from stn_fast.ops._operands import check_operands
from stn_fast.ops._transforms import in_transform
from stn_fast.ops.dropout import dropout
from stn_fast.ops.memory import reads_memory
from stn_fast.ops.serving import serving

_NO_PADDING = -1


def reference(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    scale: Tensor | None = None,
    outer: int = 1,
    inner: int = 1,
    padding: int = _NO_PADDING,
) -> Tensor:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it.

    tokens (outer·B·inner,) are positions; position m belongs to example (m // inner) mod B of h (B, n).
    """
    return forward_plain(tokens, weight, response_weight, weight_gate, h, scale, outer, inner, padding)


def fold(weight: Tensor, response_weight: Tensor, weight_gate: Tensor, h: Tensor) -> Tensor:
    """The plain table (V, D) that a gated one is at a single h (n,): E + R diag(Gw h)."""
    return torch.addcmul(weight, response_weight, weight_gate @ h)


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


@reads_memory
def _compute(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
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
    backend = serving(weight, tokens, h)
    if backend != "triton" or not tokens.is_cuda:  # the kernel looks at them itself
        _check_range(tokens, len(weight))
    scale = None if rate is None or step is None else row_scale(len(weight), rate, step, seed, stream)
    operands = (tokens, weight, response_weight, weight_gate, h, scale, outer, inner)
    if backend == "triton":
        from stn_fast.kernels import gated_embedding as kernels

        return kernels.forward(*operands)
    return forward_core(*operands) if backend == "cpp" else forward_plain(*operands, padding)


def _check_sizes(tokens: Tensor, *rest: Any) -> None:
    h, outer, inner = rest[3], *rest[8:10]
    if len(tokens) != outer * len(h) * inner:
        raise ValueError(f"gated_embedding: {len(tokens)} tokens are not {outer * inner} for each of {len(h)} examples")


_gated_embedding = register("gated_embedding", _compute, _check_sizes)


@_gated_embedding.register_fake
def _(tokens, weight, *rest):
    return weight.new_empty(tokens.shape[0], weight.shape[1])


@reads_memory
def _compute_backward(
    de: Tensor,
    tokens: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
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
) -> list[Tensor]:
    """The wanted gradients, in the order of `Gradients`; `sparse`: of E and R a row for each position."""
    asked, de = Wanted(*wanted), de.contiguous()
    scale = None if rate is None or step is None else row_scale(len(response_weight), rate, step, seed, stream)
    operands = (de, tokens, response_weight, weight_gate, h, scale, outer, inner, padding)
    if serving(response_weight, tokens, h) == "cpp" and not sparse:
        gradients = backward_core(*operands, asked)
    else:
        # On CUDA too: torch sums the rows of a word in a fixed order and in float32.
        gradients = backward_plain(*operands, sparse, asked)
    return [gradient for gradient in gradients if gradient is not None]


_gated_embedding_backward = torch.library.custom_op(
    "stn_fast::gated_embedding_backward", _compute_backward, mutates_args=()
)


@_gated_embedding_backward.register_fake
def _(de, tokens, response_weight, weight_gate, h, *rest):
    *_, sparse, wanted = rest
    table = de if sparse else response_weight
    likes = (table, table, weight_gate, h)
    return [torch.empty_like(like) for like, wants in zip(likes, wanted, strict=True) if wants]


_INPUTS = 13


def _setup_context(ctx, inputs, output):
    tokens, _, response_weight, weight_gate, h, rate, step, *ctx.options = inputs
    ctx.save_for_backward(tokens, response_weight, weight_gate, h, rate, step)


def _backward(compute, ctx, de):
    wanted = list(ctx.needs_input_grad[1:5])
    if not any(wanted):
        return (None,) * _INPUTS
    # Read once: under torch.utils.checkpoint a second look is an error.
    tokens, response_weight, *_ = saved = ctx.saved_tensors
    *_, padding, sparse = ctx.options
    computed = iter(compute(de, *saved, *ctx.options, wanted))
    gradients = [next(computed) if wants else None for wants in wanted]
    if sparse:
        gradients[:2] = [_as_sparse(rows, tokens, response_weight, padding) for rows in gradients[:2]]
    return None, *gradients, *[None] * (_INPUTS - 5)


def _as_sparse(rows: Tensor | None, tokens: Tensor, table: Tensor, padding: int) -> Tensor | None:
    """A gradient of the table (V, D) from what each position contributes (positions, D), as torch.nn.Embedding's."""
    if rows is None:
        return None
    kept = tokens != padding
    return torch.sparse_coo_tensor(tokens[kept][None], rows[kept], tuple(table.shape), check_invariants=False)


_gated_embedding.register_autograd(partial(_backward, _gated_embedding_backward), setup_context=_setup_context)
_eager = eager_function(_compute, _setup_context, _backward, _compute_backward, _gated_embedding_backward)


def gated_embedding(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    *,
    example_dim: int = 0,
    padding_idx: int | None = None,
    sparse: bool = False,
    rate: Tensor | None = None,
    seed: int = 0,
    step: Tensor | int = 0,
    stream: int = 1,
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
        h: response input, (B, n) with one row an example, or (n,) shared by all of them.
        padding_idx: a row that is looked up as any other, and of E and R gets no gradient; as in torch.nn.Embedding.
        sparse: whether the gradients of E and R are sparse tensors, as torch.nn.Embedding's are with sparse=True.
            The optimizer has to take them, and torch.compile does not.
        rate: (1,) float32 in [0, 1]; not looked at, which would wait for the device.
        seed, step, stream: fix the draw of u; step may be a 0-dim int64 tensor. They matter where there is a rate.

    All floating point tensors are of one dtype: float32, float64, bfloat16 or float16; autocast leaves them alone, as
    it does torch.nn.Embedding. Gradients are computed for those inputs alone that require one. Forward-mode AD and
    torch.compile are supported; second derivatives in reverse mode are not, and raise.

    Returns:
        (..., D), on the device of weight and of its dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message names the argument.
        IndexError: a token is no row of the table. On CUDA a device-side assertion stops the process instead.
    """
    _check(tokens, weight, response_weight, weight_gate, h, example_dim, padding_idx)
    at = None
    if rate is not None:
        if rate.shape != (1,) or rate.dtype != torch.float32 or rate.requires_grad:
            raise ValueError(
                f"gated_embedding wants rate (1,) float32 without a gradient; got {tuple(rate.shape)} {rate.dtype}, "
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
    if in_transform():
        scale = None if rate is None or at is None else row_scale(len(weight), rate, at, seed, stream)
        e = reference(rows, weight, response_weight, weight_gate, h, scale, outer, inner, padding)
    else:
        floats = (weight, response_weight, weight_gate, h)
        run = _gated_embedding if traced(rows, *floats) else _eager
        operands = (tensor.contiguous() for tensor in floats)
        e = run(rows.contiguous(), *operands, rate, at, seed, stream, outer, inner, padding, sparse)
    return e.view(*tokens.shape, weight.shape[1])


def _check(
    tokens: Tensor,
    weight: Tensor,
    response_weight: Tensor,
    weight_gate: Tensor,
    h: Tensor,
    example_dim: int,
    padding_idx: int | None,
) -> None:
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim < 1 or tokens.device != weight.device:
        raise ValueError(
            f"gated_embedding wants tokens as int64 or int32 of at least one dimension on {weight.device}; "
            f"got {tuple(tokens.shape)} {tokens.dtype} on {tokens.device}"
        )
    if weight.ndim != 2 or h.ndim not in (1, 2) or not weight.is_floating_point():
        raise ValueError(
            "gated_embedding wants weight (V, D) in floating point and h (B, n) or (n,); "
            f"got weight {tuple(weight.shape)} {weight.dtype}, h {tuple(h.shape)}"
        )
    if not -tokens.ndim <= example_dim < tokens.ndim:
        raise ValueError(f"gated_embedding: example_dim={example_dim} is no dimension of tokens {tuple(tokens.shape)}")
    words, n = weight.shape[0], h.shape[-1]
    if padding_idx is not None and not -words <= padding_idx < words:
        raise ValueError(f"gated_embedding: padding_idx={padding_idx} is no row of weight {tuple(weight.shape)}")
    wanted = {
        "response_weight": (response_weight, tuple(weight.shape)),
        "weight_gate": (weight_gate, (weight.shape[1], n)),
        "h": (h, (tokens.shape[example_dim], n) if h.ndim == 2 else (n,)),
    }
    check_operands("gated_embedding", wanted, weight, tokens=tokens, weight=weight, h=h, example_dim=example_dim)
