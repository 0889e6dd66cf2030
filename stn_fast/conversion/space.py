"""The hyperparameter space that a model suggests: one dropout rate per group of dropout modules, and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from stn_fast.conversion.rules import SHARING, is_noise, rate_of
from stn_fast.conversion.selection import Named, check_model, dropouts_of, selected, strengths_of
from stn_fast.hyperparameters import Hyperparameter, HyperparameterSpace

Group = Literal["type", "block", "each"]

HIGHEST_RATE = 0.95
HIGHEST_START = 0.9
SCALE = 1.0  # with 0.5, a rate of .7 that should fall rose in 4 of 12 runs of the example in the README
START_OF_ZERO = 0.05  # at a rate of 0, the location would be infinite
# Of the names of rates of modules that are more than dropout.
_SUFFIX = dict.fromkeys(("LSTM", "GRU", "MultiheadAttention", "DropConnectLSTM", "EmbeddingWithDropout"), "_dropout")


def suggest_space(model: nn.Module, group: Group = "type") -> HyperparameterSpace:
    """What `convert` tunes by default: the rates of the model's dropout modules, and weight decay.

    Every group of dropout modules shares one rate in [0, 0.95), which starts at their mean rate: at 0.05 if that is 0,
    and at 0.9 if it is 0.95 or more. So do standard deviations of noise, in [0, ∞). `weight_decay` starts at 1e-4, and
    the strengths of an `stn_fast.Augment` at its arguments. All are perturbed with σ = 1 at first, per example; rates
    of an `stn_fast.EmbeddingWithDropout` or an `stn_fast.DropConnectLSTM` once for the batch.

    Hyperparameters that do not regularise, such as learning rates, momentum and widths, can't be tuned this way: the
    training loss must depend on them.

    Args:
        model: any module; it does not change.
        group: "type" for one rate per class of dropout and last part of the module's name, such as `attn_drop`;
            "block" for one rate per top-level block, such as `blocks.0`; "each" for one rate per module, named by its
            dotted name with underscores.

    Raises:
        TypeError, ValueError: `model` is not a module or has been converted; `group` is something else.
    """
    check_model("suggest_space", model)
    chosen, _ = selected(model)
    return space_of(grouped(dropouts_of(chosen), group), strengths_of(chosen))


def space_of(groups: dict[str, list[Named]], strengths: Sequence[Hyperparameter]) -> HyperparameterSpace:
    """The space with a rate for each group, and these strengths."""
    rates = [_rate(name, group) for name, group in groups.items()]
    return HyperparameterSpace([*rates, *strengths, Hyperparameter("weight_decay", low=0.0, init=1e-4, scale=SCALE)])


def _rate(name: str, group: Sequence[Named]) -> Hyperparameter:
    """A rate, or the standard deviation of noise."""
    strengths = [rate_of(one.module) or 0.0 for one in group]
    mean = strengths[0] if len(set(strengths)) == 1 else sum(strengths) / len(strengths)
    if any(is_noise(one.module) for one in group):
        return Hyperparameter(name, low=0.0, init=mean or START_OF_ZERO, scale=SCALE)
    start = HIGHEST_START if mean >= HIGHEST_RATE else mean or START_OF_ZERO
    differs = not any(type(one.module) in SHARING for one in group)  # they may share a name with others
    return Hyperparameter(name, low=0.0, high=HIGHEST_RATE, init=start, scale=SCALE, per_example=differs)


def grouped(dropouts: Sequence[Named], group: Group) -> dict[str, list[Named]]:
    """The dropout modules by the name of the hyperparameter that is their rate."""
    if group not in get_args(Group):
        raise ValueError(f"group must be one of {', '.join(map(repr, get_args(Group)))}, got {group!r}")
    kinds = {role: {one.kind for one in dropouts if _role(one) == role} for role in map(_role, dropouts)}
    groups: dict[str, list[Named]] = {}
    for one in dropouts:
        if group == "each":
            name = one.name.replace(".", "_") + _SUFFIX.get(one.kind, "") if one.name else _role(one)
            while name in groups:  # a.b_c and a_b.c would both be a_b_c
                name += "_"
        elif group == "block":
            name = _block(one)
        else:
            role = _role(one)
            name = role if len(kinds[role]) == 1 else f"{role}_{one.kind.lower()}"
        groups.setdefault("weight_decay_dropout" if name == "weight_decay" else name, []).append(one)
    return groups


def _role(one: Named) -> str:
    """The last part of its name, or that of the dict; of an entry of a container, whose name is a number, its class."""
    last = (one.name.rpartition(".")[0] if one.of_dict else one.name).rpartition(".")[2]
    role = one.kind.lower() if last.isdigit() or not last else last
    return role + _SUFFIX.get(one.kind, "")


def _block(one: Named) -> str:
    """The first part of its name, and the number after it if that is a module that contains it."""
    first, *rest = one.name.split(".")
    if not rest:
        return _role(one)
    kind = "noise" if is_noise(one.module) else "shared_dropout" if type(one.module) in SHARING else "dropout"
    return f"{first}_{rest[0]}_{kind}" if rest[0].isdigit() and len(rest) > 1 else f"{first}_{kind}"
