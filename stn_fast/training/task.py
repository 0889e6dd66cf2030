"""A training task: model, hyperparameters, data, objectives and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast.conversion.folding import tuned_in
from stn_fast.data import DataSet, Split
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.training.batches import Batching, IndependentExamples


class Objective(Protocol):
    """A loss that steps minimise, called with these positional arguments.

    Args:
        model: the network, to be called with the HyperBatch, as `outputs` does.
        batch: a batch with ``inputs`` and ``targets``: a ``Split``, or another kind made by the task's batching, such
            as a ``Window``.
        hyper: the hyperparameters, one row for each example of the batch.

    Returns a tensor of one number, the mean over the examples; or (mean, new state), if the batch carries a state.
    """

    def __call__(self, model: nn.Module, batch: Any, hyper: HyperBatch, /) -> Tensor | tuple[Tensor, Any]: ...


class Scores(Protocol):
    """The scores that an evaluation computes, with the arguments of an `Objective`.

    Returns {name: scalar}, each a sum over the examples of the batch, or ({name: scalar}, new state).
    """

    def __call__(
        self, model: nn.Module, batch: Any, hyper: HyperBatch, /
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Any]: ...


# {name: mean score} -> {name: reported score}.
Report = Callable[[dict[str, float]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """Everything that a recipe builds and a trainer needs.

    ``training_objective`` may include penalties; ``validation_objective``, which the hyperparameters minimise, must
    not. ``scores`` are computed in evaluations and must include ``loss``, the validation objective as a sum over
    examples. ``report`` may add scores computed from their means, such as perplexity. ``batching`` makes the batches
    for all of these, from each of ``data``, which are splits or `stn_fast.training.loaders.Loaded`; ``data.test`` may
    be None. ``facts`` are facts about the data that the result records, for comparison with other results.
    ``vocabulary`` lists the words of a text by their numbers; a run directory records its checksum with those of the
    splits. ``loss_unit`` is the unit of the losses in plots. ``allow_unused`` is for objectives that read
    ``hyper.values`` instead of ``hyper["name"]``; otherwise, a hyperparameter that is never looked up is an error.
    ``around_step`` makes the context in which a step with this number is taken.
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
    around_step: Callable[[int], AbstractContextManager[Any]] = field(default=nullcontext)


def outputs(model: nn.Module, hyper: HyperBatch, inputs: Tensor, *others: Any) -> Any:
    """``model(inputs, hyper, *others)``; of a converted model ``model(inputs, *others)``, which then uses ``hyper``."""
    tuned = tuned_in(model)
    if tuned is None:
        return model(inputs, hyper, *others)
    with tuned.using(hyper):
        return model(inputs, *others)


def classification_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    """Mean cross entropy in nats of the `outputs`, logits (B, classes), against class indices (B,)."""
    return F.cross_entropy(outputs(model, hyper, batch.inputs), batch.targets)


def decayed_classification_loss(model: nn.Module, batch: Split, hyper: HyperBatch) -> Tensor:
    """Cross entropy `with_weight_decay`."""
    return with_weight_decay(classification_loss(model, batch, hyper), model, hyper)


def with_weight_decay(
    loss: Tensor,
    model: nn.Module,
    hyper: HyperBatch,
    penalty_of: Callable[[nn.Module, HyperBatch, Tensor], Tensor] | None = None,
) -> Tensor:
    """``loss`` + ½·weight_decay·‖W_eff‖² averaged over examples, if there is a hyperparameter `weight_decay`.

    The matrices and filters of gated layers are decayed; biases and norms are not. Your own layers are decayed if they
    have a method ``weight_decay_penalty(hyper, decay)`` that returns ½ · mean over examples of decay[b] · ‖W_eff[b]‖².
    A ``weight`` that several of these layers share is decayed once, with the response of the first of them.

    A layer's attribute ``decay_name`` names another hyperparameter to decay it with, or is None for none; `convert`
    sets it if it is given a `stn_fast.WeightDecay`.

    ``penalty_of(layer, hyper, decay)`` computes the penalty of a layer that does not have its own weights.
    """
    penalised = [layer for layer in model.modules() if hasattr(type(layer), "weight_decay_penalty")]
    names = [getattr(layer, "decay_name", "weight_decay") for layer in penalised]
    decays = {name: hyper[name] for name in dict.fromkeys(["weight_decay", *names]) if name in hyper}
    decayed: set[int] = set()
    for layer, name in zip(penalised, names, strict=True):
        penalty: Any = layer.weight_decay_penalty
        weight = getattr(layer, "weight", None)
        if name not in decays or id(weight) in decayed:
            continue
        loss = loss + (penalty(hyper, decays[name]) if penalty_of is None else penalty_of(layer, hyper, decays[name]))
        if isinstance(weight, nn.Parameter):
            decayed.add(id(weight))
    return loss


def classification_scores(model: nn.Module, batch: Split, hyper: HyperBatch) -> dict[str, Tensor]:
    """Sums over the batch: cross entropy in nats as ``loss``, and the number of correct answers as ``accuracy``."""
    logits = outputs(model, hyper, batch.inputs)
    right = (logits.argmax(1) == batch.targets).sum()
    return {"loss": F.cross_entropy(logits, batch.targets, reduction="sum"), "accuracy": right}
