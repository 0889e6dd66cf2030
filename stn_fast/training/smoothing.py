"""Cross entropy with label smoothing at a rate for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def smoothed_cross_entropy(
    logits: Tensor, targets: Tensor, smoothing: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Mean over the rows of (1 − ε_b)·CE + ε_b·mean_c(−log p_c), for rows of example b.

    If all examples have the same ε, it is ``F.cross_entropy(..., label_smoothing=ε)``, which also defines the effect of
    the class weights and of ignored targets.

    Args:
        logits: (N, C) or (N, C, d1, ...), for N = B examples or N = k·B consecutive rows of each.
        targets: class indices (N, d1, ...), or probabilities like the logits.
        smoothing: ε, (B,), in [0, 1].
        weight, ignore_index: as of `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: N is not a multiple of B.
    """
    examples = len(smoothing)
    if logits.ndim < 2 or examples == 0 or logits.shape[0] == 0 or logits.shape[0] % examples:
        raise ValueError(
            "label smoothing: dimension 0 of the logits must count the examples of the HyperBatch, or several "
            f"consecutive rows of each, and dimension 1 the classes; got {tuple(logits.shape)} for {examples} examples"
        )
    plain, uniform = (
        F.cross_entropy(
            logits, targets, weight, ignore_index=ignore_index, reduction="none", label_smoothing=amount
        ).view(examples, -1)
        for amount in (0.0, 1.0)
    )
    rate = smoothing.view(-1, 1)
    return torch.sum((1 - rate) * plain + rate * uniform) / _total_weight(plain, targets, weight, ignore_index)


def _total_weight(losses: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor | int:
    """What torch divides the sum of the losses by: the sum of the weights of the targets that are not ignored."""
    if targets.is_floating_point():
        return losses.numel()
    kept = targets != ignore_index
    return kept.sum() if weight is None else torch.sum(kept * weight[torch.where(kept, targets, 0)])


def is_mean_cross_entropy(loss: Callable[[Any, Any], Tensor]) -> bool:
    """Whether it is `F.cross_entropy`, or a `torch.nn.CrossEntropyLoss` that takes the mean and does not smooth."""
    if type(loss) is nn.CrossEntropyLoss:
        return loss.reduction == "mean" and loss.label_smoothing == 0
    return loss is F.cross_entropy


def cross_entropy_settings(loss: Callable[[Any, Any], Tensor]) -> dict[str, Any]:
    """The class weights and the ignored target of a loss, as arguments of `smoothed_cross_entropy`."""
    return {"weight": loss.weight, "ignore_index": loss.ignore_index} if isinstance(loss, nn.CrossEntropyLoss) else {}
