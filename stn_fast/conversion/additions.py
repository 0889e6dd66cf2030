"""Regularisers that a model lacks, which `convert` adds: dropout, weight decay and label smoothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stn_fast.hyperparameter import Hyperparameter
from stn_fast.layers.regularisers import check_rate


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout of the output of modules, each example at its own tuned rate.

        stn.convert(model, [stn.Dropout("layer4.*", init=0.1)])

    y = x · keep / (1 − rate[b]) for example b in training mode, where keep is 0 with probability rate[b], else 1. Every
    module has its own random stream; with several rows for an example, each row has its own mask. In evaluation mode,
    outputs are not dropped, and `fold` gives a model without this dropout. The modules may be of any class, converted
    or not; `include` and `exclude` do not concern them.

    Args:
        pattern: fnmatch on the dotted names of modules. Modules within others that it fits are left out, so "layer4.*"
            fits layer4.0 and layer4.1, but not layer4.0.conv1. So are the model itself and modules that are never
            called, as `torch.nn.ModuleList`. A module has the rate of the first Dropout in the list that fits it.
        init: the first rate, within (low, high).
        name: of the hyperparameter; by default "dropout" and the words of the pattern, such as `dropout_layer4`.
        low, high: bounds of the rate, 0 <= low < high < 1.
        scale: initial σ of the perturbation of the unconstrained value, as for `Hyperparameter`.

    Raises:
        ValueError: an argument is out of range; the message names it. By `convert`: another hyperparameter has the
            name, or no module is left for it. By the module: its output does not have the examples in dimension 0, or
            the one that `example_dims` of `convert` declares.
        TypeError: by the module, if its output is not a floating point tensor, such as the tuple of `torch.nn.LSTM`.
    """

    pattern: str
    init: float = 0.1
    name: str | None = None
    low: float = 0.0
    high: float = 0.95
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_pattern(self)
        check_rate(self.hyperparameter)

    @property
    def hyperparameter(self) -> Hyperparameter:
        name = _name("dropout", self)
        return Hyperparameter(name, low=self.low, high=self.high, init=self.init, scale=self.scale)


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


@dataclass(frozen=True)
class LabelSmoothing:
    """Label smoothing of the training loss of `SelfTuner`, each example at its own tuned rate ε in [0, high).

        tuned = stn.convert(model, [stn.LabelSmoothing(init=0.05)])
        tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy)

    The loss of example b is (1 − ε_b)·CE + ε_b·mean_c(−log p_c), averaged over the examples; with several rows for an
    example, all have its ε. Class weights and ignored targets have the effect that they have with the label_smoothing
    of `torch.nn.functional.cross_entropy`. The validation loss is not smoothed.

    The loss given to `SelfTuner` must be `torch.nn.functional.cross_entropy` or a `torch.nn.CrossEntropyLoss` with mean
    reduction and no smoothing of its own. Another loss must smooth the targets itself, by the rates (B,)
    ``model.tuned_hyperparameters.current["label_smoothing"]``; give `SelfTuner` a valid_loss that does not, too.

    Args:
        init: the first rate, within (0, high).
        name: of the hyperparameter.
        high: upper bound of the rate, above 0 and at most 1.
        scale: initial σ of the perturbation of the unconstrained value, as for `Hyperparameter`.

    Raises:
        ValueError: an argument is out of range; the message names it. By `convert`: another hyperparameter has the
            name, or the list has two of these. By `SelfTuner`: the loss is another one, without a valid_loss.
    """

    init: float = 0.05
    name: str = "label_smoothing"
    high: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.hyperparameter.reach[1] > 1:
            raise ValueError(f"LabelSmoothing: high must be at most 1, got {self.high}")

    @property
    def hyperparameter(self) -> Hyperparameter:
        return Hyperparameter(self.name, low=0.0, high=self.high, init=self.init, scale=self.scale)


Addition = Dropout | WeightDecay | LabelSmoothing


@dataclass(frozen=True)
class Added:
    """What `convert` did with one addition.

    Attributes:
        addition: the entry of the list.
        hyperparameter: name of its hyperparameter.
        modules: dotted names of the modules that it regularises; none for label smoothing.
    """

    addition: Addition
    hyperparameter: str
    modules: tuple[str, ...]


def _check_pattern(addition: Dropout | WeightDecay) -> None:
    if not isinstance(addition.pattern, str) or not addition.pattern:
        raise ValueError(
            f"{type(addition).__name__}: pattern must be a non-empty string, such as 'layer4.*', got "
            f"{addition.pattern!r}"
        )


def _name(role: str, addition: Dropout | WeightDecay) -> str:
    """The name that was given; by default the role and the words of the pattern: "dropout", "*.head" → dropout_head."""
    words = [role, *re.findall(r"\w+", addition.pattern)]
    return "_".join(words) if addition.name is None else addition.name
