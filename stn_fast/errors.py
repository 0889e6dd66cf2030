"""Errors that the user can fix: the command lines print them as one line and exit with status 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A bad argument, configuration, data set or run directory. The message says what is wrong and how to fix it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown ``name``: the closest known one, or all if none is close."""
    choices = list(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"
