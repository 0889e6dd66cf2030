"""PassRows: the check of the rows of layers in the first pass of a loop that calls the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fast.conversion.rows import check_rows
from stn_fast.ops.transforms import in_function_transform

MOST_CHECKS = 10  # passes, or steps with one structure of batch, that check rows while these say nothing


class PassRows:
    """Checks, when the model is first called in a pass, which examples the rows of a layer's input belong to.

    A hook on the model does so before the call, so that it also happens in a model that wraps this one, in the autocast
    and the other contexts of the loop. The hook is there during a pass only, so no copy of the model has it.

    Attributes:
        left: how many passes are still to be checked: none after a check that knows all rows.
    """

    def __init__(self, model: nn.Module, check: bool, in_any_process: Callable[[bool], bool]) -> None:
        self.model, self._in_any_process = model, in_any_process
        self.left = MOST_CHECKS if check else 0

    @contextmanager
    def checked(self, call: str, batch_size: int) -> Iterator[None]:
        """Inside, the first call of the model is checked; not in code that torch.compile or torch.func traces.

        Raises:
            ValueError: the model is not called with `batch_size` examples, or as `check_rows` says.
        """
        if self.left == 0:
            yield
            return

        def check(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and not in_function_transform():
                handle.remove()  # check_rows calls the model, too
                self._check(call, batch_size, args, kwargs)

        handle = self.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _check(self, call: str, batch_size: int, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        first = next(iter(tensors), None)
        if first is None:
            return
        known = any(batch_size in tensor.shape[:2] for tensor in tensors)  # such as (B, ...) or (T, B, ...)
        if len(first) % batch_size == 0 and not known:  # otherwise, the layers raise an error
            raise ValueError(
                f"{call}: batch_size must be the number of examples, got {batch_size} and an input "
                f"{tuple(first.shape)} of the model. If each example has several rows in it, use "
                "SelfTuner(..., check_rows=False)"
            )
        self.left -= 1
        # Another dimension may count the examples, which check_rows can't divide.
        if len(first) != batch_size:
            return
        if not self._in_any_process(bool(check_rows(self.model, *args, **kwargs))):
            self.left = 0
        unshard: Any = getattr(self.model, "unshard", None)
        if unshard is not None:  # FSDP2, which may have freed the weights after these calls
            unshard()
