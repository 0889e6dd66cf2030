"""Regularisers that a model lacks, for `convert` to add: their hyperparameters, and what they regularise."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stn_fast.hyperparameter import Hyperparameter


@dataclass(frozen=True)
class WeightDecay:
    """Weight decay of converted layers: the training loss gets ½·λ·‖W_eff‖², averaged over examples, with a tuned λ.

        stn.convert(model, [stn.WeightDecay("head", init=1e-2), stn.WeightDecay("*")])

    The λ of a layer is that of the first WeightDecay in the list that fits it; a layer that none fits is not decayed.
    The `weight_decay` of `suggest_space` is replaced. Biases and norms are not decayed. `SelfTuner` adds the penalty to
    your loss; in a loop of your own, `stn_fast.training.task.with_weight_decay` does.

    Args:
        pattern: fnmatch on dotted names; one that fits a module fits all modules in it.
        init: the first λ, above 0.
        name: of the hyperparameter; by default "weight_decay" and the words of the pattern, such as
            `weight_decay_head` for "*.head", and `weight_decay` for "*".
        scale: initial σ of the perturbation of the unconstrained value, as for `Hyperparameter`.

    Raises:
        ValueError: an argument is out of range; the message names it. By `convert`: another hyperparameter has the
            name, or no converted layer with weights is left for it.
    """

    pattern: str = "*"
    init: float = 1e-3
    name: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_pattern(self)
        _ = self.hyperparameter

    @property
    def hyperparameter(self) -> Hyperparameter:
        return Hyperparameter(_name("weight_decay", self), low=0.0, init=self.init, scale=self.scale)


Addition = WeightDecay


@dataclass(frozen=True)
class Added:
    """What `convert` did with one addition.

    Attributes:
        addition: the entry of the list.
        hyperparameter: name of its hyperparameter.
        modules: dotted names of the modules that it regularises.
    """

    addition: Addition
    hyperparameter: str
    modules: tuple[str, ...]


def _check_pattern(addition: WeightDecay) -> None:
    if not isinstance(addition.pattern, str) or not addition.pattern:
        raise ValueError(
            f"{type(addition).__name__}: pattern must be a non-empty string, such as 'layer4.*', got "
            f"{addition.pattern!r}"
        )


def _name(role: str, addition: WeightDecay) -> str:
    """The name that was given; by default the role and the words of the pattern: "dropout", "*.head" → dropout_head."""
    words = [role, *re.findall(r"\w+", addition.pattern)]
    return "_".join(words) if addition.name is None else addition.name
