"""Which modules of a model are converted, and why others are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from stn_fast.conversion.augment import Augment
from stn_fast.conversion.converted import Converted
from stn_fast.conversion.reading import reads
from stn_fast.conversion.report import Entry
from stn_fast.conversion.rules import (
    drops,
    drops_by_itself,
    has_parameters,
    is_closed,
    is_known,
    is_quantised,
    rate_of,
    reason_against,
    rule_of,
)
from stn_fast.hyperparameter import Hyperparameter
from stn_fast.ops.arguments import is_sharded


class Named(NamedTuple):
    """A module and its dotted name in the model."""

    name: str
    module: nn.Module
    of_dict: bool = False  # whether it is an entry of a dict of dropout modules, as peft has one for its adapters

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    def left_out(self, reason: str, *, asked: bool = False) -> Entry:
        return Entry(self.name, self.kind, reason=reason, asked=asked)


def check_model(who: str, model: nn.Module) -> None:
    """Raises TypeError or ValueError if this is not a model that can be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"{who}: the model is compiled: convert the plain model, then compile the converted one")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            kind = type(module).__name__
            raise ValueError(
                f"{who}: {name or 'the model'} is a {kind}, which would not average the gradients of parameters that "
                f"conversion adds: convert the module in it, and put {kind} around the result"
            )
        if isinstance(module, Converted):
            raise ValueError(f"{who}: the model has been converted already: {name or 'the model itself'} is converted")
    if hasattr(model, "tuned_hyperparameters"):
        raise ValueError(f"{who}: the model has an attribute tuned_hyperparameters, the name that conversion uses")
    if sharded := next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None):
        raise ValueError(f"{who}: {sharded} is sharded, as by fully_shard: convert the plain model, then shard it")
    devices = {parameter.device: name for name, parameter in model.named_parameters()}
    on_meta = [name for device, name in devices.items() if device.type == "meta"]
    if on_meta:
        raise ValueError(f"{who}: {on_meta[0]} is on the meta device: give the model its weights first")
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"{who}: the parameters must be on one device, got {found}")


def selected(
    model: nn.Module, include: Iterable[str] = ("*",), exclude: Iterable[str] = ()
) -> tuple[list[Named], list[Entry]]:
    """The modules to convert, in the order of `named_modules`, and entries for those that are left out."""
    chosen: list[Named] = []
    left_out: list[Entry] = []
    for one in _concerned(model):
        reason = reason_against(one.module) or _reading(model, one)
        if not matches(one.name, include):
            left_out.append(one.left_out("not in include", asked=True))
        elif matches(one.name, exclude):
            left_out.append(one.left_out("in exclude", asked=True))
        elif is_closed(one.module) and any(
            matches(f"{one.name}.{child}".lstrip("."), exclude) for child, _ in one.module.named_modules() if child
        ):
            left_out.append(one.left_out("it can't be converted without a module in it that is in exclude", asked=True))
        elif reason is not None:
            left_out.append(one.left_out(reason))
        else:
            chosen.append(one)
    return chosen, left_out


def _reading(model: nn.Module, one: Named) -> str | None:
    """That the module containing a dropout module passes its rate on, as to scaled_dot_product_attention."""
    owner, _, child = one.name.rpartition(".")
    if not child or rate_of(one.module) is None:
        return None
    parent = model.get_submodule(owner)
    fused = getattr(parent, "fused_attn", None)  # timm's: whether attention is one operation, and else calls its child
    read = next((rate for rate in ("p", "drop_prob", "std") if reads(type(parent), child, rate)), None)
    if read is None or fused is False:
        return None
    told = "" if fused is None else "; it calls it if you set fused_attn = False before the conversion"
    return f"{type(parent).__name__} reads its rate, self.{child}.{read}, which stays the same for all examples{told}"


def dropouts_of(chosen: Sequence[Named]) -> list[Named]:
    """Those that have a dropout rate."""
    return [one for one in chosen if rate_of(one.module) is not None]


def strengths_of(chosen: Sequence[Named]) -> tuple[Hyperparameter, ...]:
    """The hyperparameters of the model's `Augment`.

    Raises:
        ValueError: there are several.
    """
    found = [one for one in chosen if isinstance(one.module, Augment)]
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ValueError(f"convert: a model can have one stn.Augment, got {names}")
    return found[0].module.hyperparameters if found else ()  # type: ignore[return-value]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits this dotted name, or that of a module that contains it."""
    parts = name.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in names)


def check_patterns(argument: str, model: nn.Module, patterns: Iterable[str]) -> None:
    """Raises ValueError naming a pattern that fits no module."""
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"convert: {argument} {pattern!r} fits the name of no module (see model.named_modules())")


def _concerned(model: nn.Module) -> Iterator[Named]:
    """The modules with a rule, with parameters of their own, or with dropout; not the children of closed modules."""
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{parent}." if parent else "") for parent in closed):
            continue
        if is_closed(module):
            closed.append(name)
        own = has_parameters(module)
        ruled = type(module) is Augment or (rule_of(module) is not None and not is_known(module))
        if is_closed(module) or own or ruled or is_quantised(module) or drops(module) or drops_by_itself(module):
            owner = name.rpartition(".")[0]
            named_as_dropouts = "drop" in owner.rpartition(".")[2]
            yield Named(name, module, named_as_dropouts and isinstance(model.get_submodule(owner), nn.ModuleDict))
