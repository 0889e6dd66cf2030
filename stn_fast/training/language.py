"""Objectives for language models that are called as ``model(inputs, hyper, state)`` on the windows of a text.

A converted model is called as ``model(inputs, state)``.

The model returns (logits (T, B, words), new state, ...); ``state`` is None at the beginning of a text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.hyperparameters import HyperBatch
from stn_fast.training.streams import IGNORED, State, Window
from stn_fast.training.task import outputs


def next_word_loss(model: nn.Module, window: Window, hyper: HyperBatch) -> tuple[Tensor, State]:
    """Mean cross entropy of the window's words in nats, and the state after the window."""
    logits, state, *_ = _of_window(model, window, hyper)
    return _cross_entropy(logits, window, "mean"), state


def regularised_next_word_loss(model: nn.Module, window: Window, hyper: HyperBatch) -> tuple[Tensor, State]:
    """``next_word_loss`` and ``activation_penalty`` of a ``LanguageModel``: for training only."""
    found = _of_window(model, window, hyper)
    loss = _cross_entropy(found.logits, window, "mean") + activation_penalty(found.raw, found.dropped, hyper)
    return loss, found.state


def next_word_scores(model: nn.Module, window: Window, hyper: HyperBatch) -> tuple[dict[str, Tensor], State]:
    """Summed cross entropy of the window's words in nats, as ``loss``, and the state after the window."""
    logits, state, *_ = _of_window(model, window, hyper)
    return {"loss": _cross_entropy(logits, window, "sum")}, state


def activation_penalty(raw: Tensor, dropped: Tensor, hyper: HyperBatch) -> Tensor | float:
    """α·mean(dropped²) + β·mean((raw_t − raw_{t−1})²), averaged over examples, which may differ in α and β.

    These are AR and TAR of Merity et al. (2017). α is the hyperparameter ``activation_regularization``, β is
    ``temporal_activation_regularization``; each is 0 if the space lacks it.

    Args:
        raw, dropped: hidden states of the last layer before and after its dropout, (T, B, H).

    Raises:
        ValueError: α or β could be negative.
    """
    penalty: Any = 0.0
    # A single word has no time step before it.
    change = raw[1:] - raw[:-1] if len(raw) > 1 else raw.new_zeros(raw.shape)
    for name, activations in (("activation_regularization", dropped), ("temporal_activation_regularization", change)):
        if name in hyper:
            low = hyper.space[name].low
            if low is None or low < 0:
                raise ValueError(f"hyperparameter {name!r} weights a penalty, so its bound low must be >= 0, got {low}")
            wide = activations.to(torch.promote_types(activations.dtype, torch.float32))
            penalty = penalty + (hyper[name] * wide.square().mean((0, 2))).mean()
    return penalty


def with_perplexity(means: dict[str, float]) -> dict[str, float]:
    """Adds ``perplexity``, exp of the mean loss, to the mean scores; infinite if too large for a float."""
    try:
        perplexity = math.exp(means["loss"])
    except OverflowError:
        perplexity = math.inf
    return {**means, "perplexity": perplexity}


def _of_window(model: nn.Module, window: Window, hyper: HyperBatch) -> Any:
    if not isinstance(window, Window):
        raise TypeError(f"a language model needs a Window of Streams or WholeText, got a {type(window).__name__}")
    return outputs(model, hyper, window.inputs, window.state)


def _cross_entropy(logits: Tensor, window: Window, reduction: str) -> Tensor:
    targets = window.targets.flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction=reduction)
