"""Providers that time a function with the needed gradients, or without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Provider


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    grad_outputs: Tensor | Sequence[Tensor],
    forward: bool = True,
) -> Provider:
    """Times ``function`` and the gradients of the wanted inputs; ``forward=False`` times only the gradients."""
    if not any(wanted):
        plain = [tensor.detach() for tensor in inputs]

        def evaluate(_: None) -> object:
            with torch.no_grad():
                return function(*plain)

        return Provider(evaluate)
    leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(inputs, wanted, strict=True)]
    targets = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]

    def backward(outputs: Any) -> object:
        return torch.autograd.grad(outputs, targets, grad_outputs)

    if forward:
        return Provider(lambda _: backward(function(*leaves)))
    return Provider(backward, prepare=lambda: function(*leaves))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the one shape of a case."""
    return torch.compile(function, dynamic=False)
