"""The objectives of language models, which are called as ``model(inputs, hyper, state)`` on the windows of a text.

A model returns (logits (T, B, words), new state); ``state`` is None where a text begins.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.hyperparameters import HyperBatch
from stn_fast.training.streams import IGNORED, State, Window


def next_word_loss(model: nn.Module, window: Window, hyper: HyperBatch) -> tuple[Tensor, State]:
    """Mean cross entropy of the window's words in nats, and the state after it."""
    return _cross_entropy(model, window, hyper, "mean")


def next_word_scores(model: nn.Module, window: Window, hyper: HyperBatch) -> tuple[dict[str, Tensor], State]:
    """The cross entropy of the window's words in nats, summed, as ``loss``; and the state after it."""
    loss, state = _cross_entropy(model, window, hyper, "sum")
    return {"loss": loss}, state


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """The mean scores and ``perplexity``, exp of the mean loss; infinite where that is beyond a float."""
    try:
        perplexity = math.exp(means["loss"])
    except OverflowError:
        perplexity = math.inf
    return {**means, "perplexity": perplexity}


def _cross_entropy(model: nn.Module, window: Window, hyper: HyperBatch, reduction: str) -> tuple[Tensor, State]:
    logits, state = model(window.inputs, hyper, window.state)
    targets = window.targets.flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction=reduction), state
