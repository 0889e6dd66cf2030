"""What convert did with each module, as a list of entries and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stn_fast.conversion.additions import Added
from stn_fast.hyperparameters import HyperparameterSpace

MOST_NAMES = 3  # names of modules in one line of the table


@dataclass(frozen=True)
class Entry:
    """One module that was converted, or left out although it has parameters or drops activations.

    Attributes:
        name: dotted name of the module in the model; "" for the model itself.
        kind: name of its class before the conversion.
        hyperparameter: the hyperparameter that is its dropout rate; None for other modules.
        reason: why it was left out; None if it was converted.
        asked: whether it was left out because the call asked for it.
    """

    name: str
    kind: str
    hyperparameter: str | None = None
    reason: str | None = None
    asked: bool = False


def table(report: Sequence[Entry], space: HyperparameterSpace, added: Sequence[Added] = ()) -> str:
    """One line for each kind of converted module, for each hyperparameter, and for each reason to leave modules out."""
    converted = [entry for entry in report if entry.reason is None]
    layers = _grouped((entry.kind, entry.name) for entry in converted if entry.hyperparameter is None)
    rates = _grouped((entry.hyperparameter, entry.name) for entry in converted if entry.hyperparameter is not None)
    uses = {name: f", rate of {_listed(names)}" for name, names in rates.items()}
    uses |= {one.hyperparameter: f", {_use(one)}" for one in added}
    left_out = _grouped((f"{entry.kind}: {entry.reason}", entry.name) for entry in report if entry.reason is not None)
    lines = [f"stn.convert: {len(converted)} of {len(report)} modules converted"]
    lines += [f"  {kind}: {len(names)}" for kind, names in layers.items()]
    lines += [
        f"  tuned {one.name}: {_bounds(one.low, one.high)} from {one.init:.4g}{uses.get(one.name, '')}" for one in space
    ]
    lines += [f"  left out {_listed(names)} ({reason})" for reason, names in left_out.items()]
    return "\n".join(lines)


def _grouped(pairs: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(str(key), []).append(name)
    return groups


def _bounds(low: float | None, high: float | None) -> str:
    return f"{'(-inf' if low is None else f'[{low:g}'}, {'inf' if high is None else f'{high:g}'})"


def _use(added: Added) -> str:
    return f"added as {type(added.addition).__name__} of {_listed(added.modules) or 'the training loss'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"
