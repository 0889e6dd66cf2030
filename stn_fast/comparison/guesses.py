"""First guesses of hyperparameters, by which runs of one recipe differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stn_fast import values
from stn_fast.errors import UserError, did_you_mean
from stn_fast.training.config import Config, HyperparameterConfig

RECIPE = "recipe"
SHARES = {"low": 0.05, "middle": 0.3, "high": 0.65}  # of a range with two bounds
FACTORS = {"low": 0.1, "middle": 1.0, "high": 10.0}  # of the recipe's distance from the only bound

Guess = str | float


def read_guesses(text: str) -> list[Guess]:
    """The guesses in a list such as ``low,middle,high`` or ``.05,.6``, each once.

    Raises:
        UserError: one is neither a number nor ``low``, ``middle``, ``high`` or ``recipe``.
    """
    return list(dict.fromkeys(_guess(part.strip()) for part in text.split(",")))


def _guess(part: str) -> Guess:
    if part in (*SHARES, RECIPE):
        return part
    try:
        return values.number(part)
    except ValueError:
        known = did_you_mean(part, [*SHARES, RECIPE])
        raise UserError(f"--guesses {part!r}: must be a rate, or a name: {known}") from None


def guessed(defaults: Config, guess: Guess | None) -> Config:
    """``defaults`` with hyperparameters that start from ``guess``.

    ``low``, ``middle`` and ``high`` are 5 %, 30 % and 65 % of each range with two bounds, and a tenth of, once and ten
    times the recipe's distance from a single bound. A number is the start of every dropout rate, including those of
    words and weights; others keep the recipe's guess. ``recipe`` and None keep all of them.

    Raises:
        UserError: a hyperparameter has no bound, the recipe has no dropout, or its bounds do not allow the number.
    """
    if guess is None or guess == RECIPE:
        return defaults
    entries = dict(defaults.hyperparameters)
    if isinstance(guess, str):
        starts = {name: _start(name, entry, guess) for name, entry in defaults.enabled.items()}
    else:
        starts = dict.fromkeys(dropout_rates(defaults), guess)
        if not starts:
            raise UserError(f"--guesses sets dropout rates, and {defaults.recipe} has none")
    changed = {name: replace(entries[name], init=start) for name, start in starts.items()}
    return replace(defaults, hyperparameters=entries | changed)


def dropout_rates(defaults: Config) -> list[str]:
    """The hyperparameters that a number sets: every dropout rate, including those of words and weights."""
    return [name for name in defaults.hyperparameters if "dropout" in name]


def _start(name: str, entry: HyperparameterConfig, guess: str) -> float:
    if entry.low is not None and entry.high is not None:
        return entry.low + SHARES[guess] * (entry.high - entry.low)
    bound = only_bound(name, entry, "--guesses low, middle and high need")
    return bound + FACTORS[guess] * (entry.init - bound)


def only_bound(name: str, entry: HyperparameterConfig, need: str) -> float:
    """The bound of a hyperparameter with a single one.

    Raises:
        UserError: it has none; ``need`` begins the message.
    """
    bound = entry.high if entry.low is None else entry.low
    if bound is None:
        raise UserError(f"{need} a bound of {name}: --set hyperparameters.{name}.low=0, for example")
    return bound


def labels(guesses: Sequence[Guess]) -> list[str]:
    """What the guesses are called in tables."""
    return [guess if isinstance(guess, str) else f"{guess:g}" for guess in guesses]
