"""Errors that are the user's to mend: the command lines print them as one line and exit with status 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A bad argument, configuration, data set or run directory. The message names the thing and the cure."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown ``name``: the nearest right one, or all of them where none is near."""
    choices = list(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"
