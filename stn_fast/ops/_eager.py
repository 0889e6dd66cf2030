"""Bypass the dispatcher in eager mode.

torch.library.custom_op is what torch.compile, torch.export and the dispatch modes need, and its dispatch in eager mode
takes longer than sampling a batch of hyperparameters does. Where nobody is tracing, the same functions run behind a
plain torch.autograd.Function instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def traced(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the registered operation must be called: by a compiler, a tracer, a dispatch mode, a tensor subclass.

    All tensors are on the device of the first; those of the meta device have shapes, which the registration knows.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch.jit.is_tracing() or first.is_meta:
        return True
    return not _PLAIN.issuperset(map(type, (first, *others)))


def register(name: str, compute: Callable[..., Any], check: Callable[..., None]) -> Any:
    """The operation `name` that computes as `compute` does where `check`, called alike, raises nothing.

    The public functions check their arguments. A trace calls the operation alone, on whatever it is given later, and
    the kernels believe the sizes that they are told.
    """

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return compute(*arguments)

    schema = torch.library.infer_schema(compute, mutates_args=())
    return torch.library.custom_op(f"stn_fast::{name}", run, mutates_args=(), schema=schema)


def known_sizes(sizes: Sequence[int]) -> list[int]:
    """`sizes` as ints: torch.jit.trace gives tensors, which a registered operation doesn't take in a list."""
    return [int(size) for size in sizes] if torch.jit.is_tracing() else list(sizes)


def eager_function(
    compute: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    compute_backward: Callable[..., Any],
    registered_backward: Callable[..., Any],
) -> Callable[..., Any]:
    """An operation from the functions that its registration takes, without the dispatcher in between.

    `backward` is called with the function that computes it, then as register_autograd calls it. Where a graph of
    the backward pass itself is needed (create_graph=True), that function is the registered one, which differentiates
    or raises; the plain one would be taken for a constant. So it is where a dispatch mode must see it.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            plain = _PLAIN.issuperset(map(type, gradients))
            must_see = torch.is_grad_enabled() or is_in_torch_dispatch_mode() or not plain
            return backward(registered_backward if must_see else compute_backward, ctx, *gradients)

    def run(*inputs: Any) -> Any:
        return Eager.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    return run
