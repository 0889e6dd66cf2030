"""What every operation asks before it hands its inputs to a kernel."""

import torch
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether forward-mode AD (forward_ad.dual_level) or a torch.func transform (grad, jvp, vmap, …) is active.

    A torch.library.custom_op returns a *silent zero tangent* in the first and raises in the others, so the public
    functions of stn_fast.ops then compute from plain torch operations, which are right in every mode.
    """
    return forward_ad._current_level >= 0 or in_function_transform()


def in_function_transform() -> bool:
    """Whether a torch.func transform is active, whose tensors have no memory that a kernel could read."""
    # Not peek_interpreter_stack: torch.compile takes its answer for True everywhere.
    return torch._C._functorch.maybe_current_level() is not None
