"""Parser, error handling and exit status of the command lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from stn_fast import values
from stn_fast.errors import UserError, did_you_mean
from stn_fast.terminal import outputs, printable
from stn_fast.training.signals import Interrupted

READER_GONE = 128 + 13  # the exit status of a command ended by SIGPIPE


def whole_number(text: str) -> int:
    """Argument type of an integer, written as in a configuration file."""
    try:
        return values.whole_number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def number(text: str) -> float:
    """Argument type of a number, written as in a configuration file."""
    try:
        return values.number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None


def run_command(command: Callable[[], int]) -> int:
    """Runs ``command`` and returns its exit status, or 2 for a UserError, which is printed as one line.

    A command continues to its end even if the reader of its output, such as `head`, exits, so that long runs lose no
    work. If it only printed something and raised SystemExit, as --help does, the status is then that of a command ended
    by SIGPIPE. If output can't be written for another reason, such as a full disk, this is an error at the end, with
    status 1.
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
        except Interrupted as stop:
            status = complain(str(stop), stop.exit_status)
        except KeyboardInterrupt:
            status = complain("stopped by Ctrl-C", 130)
        output.flush()
        if output.reader_gone:
            return READER_GONE if only_printed else status
        if output.failure is not None:
            return complain(f"cannot write to standard output ({output.failure.strerror})", status or 1)
        return status


def complain(text: str, status: int) -> int:
    """Prints ``text`` as one line of error; returns ``status``."""
    print(f"error: {printable(text)}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors as a UserError of one line."""

    def __init__(self, program: str, about: str | None):
        super().__init__(prog=program, description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def given(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The arguments by name; the error for an unknown one suggests the closest known one."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings if len(option) > 2]
            raise UserError(f"unknown argument '{unknown[0]}': {did_you_mean(unknown[0].partition('=')[0], options)}")
        return vars(known)
