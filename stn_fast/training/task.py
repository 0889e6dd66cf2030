"""What there is to learn: a model, its hyperparameters, its data, and the functions that score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.data import DataSet, Split
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.training.batches import Batching, IndependentExamples


class Objective(Protocol):
    """A loss that steps descend, a function of these arguments by position.

    Args:
        model: the network, to be called with the HyperBatch.
        batch: its ``inputs`` and ``targets``, a ``Split`` or what the task's batching makes, such as a ``Window``.
        hyper: the hyperparameters, one row for each example of the batch.

    Returns a tensor of one number, the mean over the examples. For a batch that keeps a state for the next one it may
    return (mean, new state).
    """

    def __call__(self, model: nn.Module, batch: Any, hyper: HyperBatch, /) -> Tensor | tuple[Tensor, Any]: ...


class Scores(Protocol):
    """What an evaluation reports, a function of the arguments of an `Objective`.

    Returns {name: scalar}, each a sum over the examples of the batch, or ({name: scalar}, new state).
    """

    def __call__(
        self, model: nn.Module, batch: Any, hyper: HyperBatch, /
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Any]: ...


# {name: mean score} -> {name: what is reported of it}.
Report = Callable[[dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """All that a recipe builds and a trainer needs.

    ``training_objective`` may carry penalties; ``validation_objective`` must not: the hyperparameters descend it.
    ``scores`` reports on a split; it must include ``loss``, the validation objective as a sum. ``report`` may add to
    their means what is no mean itself. ``batching`` makes the batches that all of them see. ``facts`` are what a result
    should say of the data, for it to be compared with others. ``vocabulary`` is the words that the numbers in a text
    stand for; a run directory records it together with the splits. ``loss_unit`` is the unit of the losses in
    plots. ``allow_unused`` is for objectives that read ``hyper.values`` in place of ``hyper["name"]``: a hyperparameter
    that nothing looks up is an error otherwise.
    """

    space: HyperparameterSpace
    model: nn.Module
    data: DataSet
    training_objective: Objective
    validation_objective: Objective
    scores: Scores
    report: Report = dict
    batching: Batching = field(default_factory=IndependentExamples)
    facts: Mapping[str, float] = field(default_factory=dict)
    vocabulary: Sequence[str] = ()
    loss_unit: str = ""
    allow_unused: bool = False


def classification_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    """Mean cross entropy in nats of ``model(inputs, hyper)``, logits (B, classes), against class indices (B,)."""
    return F.cross_entropy(model(batch.inputs, hyper), batch.targets)


def decayed_classification_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    """Cross entropy + ½·weight_decay·‖W_eff‖² averaged over examples, where there is a hyperparameter `weight_decay`.

    The matrices and filters of gated layers are decayed; biases and norms are not. A layer of your own is decayed that
    has a method ``weight_decay_penalty(hyper, decay)``, ½ · mean over examples of decay[b] · ‖W_eff[b]‖².
    """
    loss = classification_loss(model, batch, hyper)
    if "weight_decay" not in hyper:
        return loss
    decay = hyper["weight_decay"]
    for layer in model.modules():
        penalty = getattr(type(layer), "weight_decay_penalty", None)
        if penalty is not None:
            loss = loss + penalty(layer, hyper, decay)
    return loss


def classification_scores(model: nn.Module, batch: Split, hyper: HyperBatch) -> dict[str, Tensor]:
    """Summed cross entropy in nats as ``loss`` and the count of right answers as ``accuracy``."""
    logits = model(batch.inputs, hyper)
    right = (logits.argmax(1) == batch.targets).sum()
    return {"loss": F.cross_entropy(logits, batch.targets, reduction="sum"), "accuracy": right}
