"""The short way from a public function to its kernel.

torch.library.custom_op is what torch.compile, torch.export and the dispatch modes need, and its dispatch in eager mode
takes longer than sampling a batch of hyperparameters does. Where nobody is tracing, the same functions run behind a
plain torch.autograd.Function instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def traced(*tensors: Tensor) -> bool:
    """Whether somebody must see the registered operation: a compiler, a dispatch mode or a tensor subclass."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(type(tensor) not in _PLAIN for tensor in tensors)


def eager_function(
    compute: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    compute_backward: Callable[..., Any],
    registered_backward: Callable[..., Any],
) -> Callable[..., Any]:
    """An operation from the functions that its registration takes, without the dispatcher in between.

    `backward` is called with the function that computes it, then as register_autograd calls it. Where a graph of
    the backward pass itself is wanted (create_graph=True), that function is the registered one, which differentiates
    or refuses to; the plain one would be taken for a constant.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(registered_backward if torch.is_grad_enabled() else compute_backward, ctx, *gradients)

    def run(*inputs: Any) -> Any:
        return Eager.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    return run
