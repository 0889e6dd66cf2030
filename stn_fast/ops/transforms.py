"""Checks of every operation before it calls a kernel: transforms, tracing and tensor subclasses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def in_transform() -> bool:
    """Whether forward-mode AD (forward_ad.dual_level) or a torch.func transform (grad, jvp, vmap, …) is active.

    A torch.library.custom_op returns a *silent zero tangent* in the first and raises in the others, so the public
    functions of stn_fast.ops then use plain torch operations, which are right in every mode.
    """
    return in_forward_mode() or in_function_transform()


def in_forward_mode() -> bool:
    """Whether forward-mode AD is active, and not paused as `tangents.paused` does."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def in_function_transform() -> bool:
    """Whether a torch.func transform is active, whose tensors have no memory that a kernel could read."""
    # Not peek_interpreter_stack, whose result torch.compile always takes for True.
    return torch._C._functorch.maybe_current_level() is not None


def plain(*tensors: Tensor | None) -> bool:
    """Whether each is a tensor, a parameter or None, and not a subclass, which may store its numbers elsewhere."""
    return _PLAIN.issuperset(map(type, tensors))


def traced(first: Tensor, *others: Tensor | None) -> bool:
    """Whether to call the registered operation: for compilers, tracers, dispatch modes, subclasses and meta tensors.

    All tensors are on the device of the first.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch.jit.is_tracing() or first.is_meta:
        return True
    return not plain(first, *others)


def known_sizes(sizes: Sequence[int]) -> list[int]:
    """`sizes` as ints: torch.jit.trace gives tensors, which a registered operation doesn't accept in a list."""
    return [int(size) for size in sizes] if torch.jit.is_tracing() else list(sizes)
