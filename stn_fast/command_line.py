"""What the command lines share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from stn_fast import values
from stn_fast.errors import UserError, did_you_mean
from stn_fast.terminal import outputs, printable

READER_GONE = 128 + 13  # what a shell reports of a command that SIGPIPE has ended


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


def run_command(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns the exit status: what it returned, or 2 for a UserError, which becomes one line.

    A command goes on to its end when the reader of its output goes away: a run of hours loses no work to `| head`.
    Where there was nothing to do but print, which ends in SystemExit as --help does, the status is then that of a
    command which SIGPIPE has ended. Output that can't be written for another reason, such as a full disk, is an error
    at the end, with status 1.
    """
    with outputs() as (output, _):
        only_printed = False
        try:
            status = command()
        except SystemExit as stop:
            status, only_printed = int(stop.code or 0), True
        except UserError as error:
            status = complain(str(error), 2)
        except OSError as error:
            status = complain(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1)
        except KeyboardInterrupt:
            status = complain("stopped by Ctrl-C", 130)
        output.flush()
        if output.reader_gone:
            return READER_GONE if only_printed else status
        if output.failure is not None:
            return complain(f"cannot write to standard output ({output.failure.strerror})", status or 1)
        return status


def complain(text: str, status: int) -> int:
    """Prints one line on what went wrong; returns ``status``."""
    print(f"error: {printable(text)}", file=sys.stderr)
    return status


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
