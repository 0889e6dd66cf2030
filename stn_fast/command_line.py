"""What the command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from stn_fast import values
from stn_fast.errors import UserError, did_you_mean


def whole_number(text: str) -> int:
    """The type of an argument that is an integer, written as in a configuration file."""
    try:
        return values.whole_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def number(text: str) -> float:
    """The type of an argument that is a number, written as in a configuration file."""
    try:
        return values.number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as a UserError."""

    def __init__(self, program: str, about: str | None):
        super().__init__(prog=program, description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def given(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The arguments by name; an unknown one is an error that names the nearest right one."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings if len(option) > 2]
            raise UserError(f"unknown argument '{unknown[0]}': {did_you_mean(unknown[0].partition('=')[0], options)}")
        return vars(known)
