"""What convert did with each module, as a list of entries and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stn_fast.conversion.additions import Added
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.terminal import aligned

Key = TypeVar("Key", bound=Hashable)

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
    """How many modules of each kind are converted, what is tuned where, and which modules are left out for a reason."""
    converted = [entry for entry in report if entry.reason is None]
    kinds = Counter(entry.kind for entry in converted)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    rates = _grouped((entry.hyperparameter, entry.name) for entry in converted if entry.hyperparameter is not None)
    uses = {"weight_decay": "weights, in the training loss"}
    uses |= {name: f"rate of {_listed(names)}" for name, names in rates.items()}
    uses |= {one.hyperparameter: _use(one) for one in added}
    rows = [(one.name, f"{one.init:.4g}", _bounds(one.low, one.high), uses.get(one.name, "")) for one in space]
    left_out = _grouped(((entry.kind, entry.reason), entry.name) for entry in report if entry.reason is not None)
    lines = [f"stn.convert: {len(converted)} of {len(report)} modules converted ({counts})"]
    lines += [f"  {line}" for line in aligned(("tuned", "starts at", "range", "use"), rows, left=4).splitlines()]
    lines += [f"  left out: {_listed(names)} ({kind}): {reason}" for (kind, reason), names in left_out.items()]
    return "\n".join(lines)


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return groups


def _bounds(low: float | None, high: float | None) -> str:
    return f"{'(-inf' if low is None else f'[{low:g}'}, {'inf' if high is None else f'{high:g}'})"


def _use(added: Added) -> str:
    return f"added as {type(added.addition).__name__} of {_listed(added.modules) or 'the training loss'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"
