"""Tangents: how the outputs of a network change along a change of its hyperparameters, to first order.

torch's forward-mode AD carries them through plain modules, as dual tensors. A gated layer at h = 0, where it is a plain
layer with W and b, has a rule of its own: with input a and tangent ȧ, and along a change δ of h,

    z = a Wᵀ + b        ż = ȧ Wᵀ + (δ Gwᵀ) ⊙ (a Rᵀ) + (δ Gbᵀ) ⊙ r

(Bae and Grosse, NeurIPS 2020). R ȧ is multiplied by h and so vanishes. The products are computed by the kernels of
plain layers, and the rest of ż in one pass, `gated_sum`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd import forward_ad

from stn_fast.ops.transforms import in_function_transform

if TYPE_CHECKING:
    from stn_fast.hyperparameters import HyperBatch


def is_centred(hyper: HyperBatch | Tensor) -> bool:
    """Whether the response input is known to be 0, without a derivative, so that a gated layer is a plain one."""
    if isinstance(hyper, Tensor) or not hyper.centred or in_function_transform():
        return False
    return split(hyper.response)[1] is None


def direction_of(hyper: HyperBatch | Tensor, like: Tensor, *weights: Tensor | None) -> Tensor | None:
    """δ (B, n) in the dtype of ``like``: the tangent of h, which is 0; None if the batch is not centred or has none.

    None too if one of the ``weights`` has a tangent: then forward-mode AD of the definition is right.
    """
    if isinstance(hyper, Tensor) or not hyper.centred or in_function_transform():
        return None
    if any(weight is not None and split(weight)[1] is not None for weight in weights):
        return None
    _, tangent = split(hyper.response)
    return None if tangent is None else tangent.to(like.dtype)


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor without its tangent, and its tangent, which is None if it has none."""
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The tensor with this tangent."""
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def paused() -> AbstractContextManager[None]:
    """Inside, forward-mode AD is off, so that kernels may compute tensors that have no tangent."""
    return forward_ad._set_fwd_grad_enabled(False)


def of_linear(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` and its tangent, for a function that is linear and draws the same numbers when called again."""
    primal, tangent = split(x)
    with paused():
        y, dy = function(primal), None if tangent is None else function(tangent)
    return dual(y, dy)
