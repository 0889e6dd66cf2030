"""Messages of the trainer in the words of a call of `stn_fast.fit`, and progress that calls callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stn_fast.errors import UserError
from stn_fast.training.disk import CannotWrite
from stn_fast.training.progress import Progress
from stn_fast.training.trainer import Diverged, Row

# What messages call the arguments of a command line, and what they are here.
_WORDS = {
    ", name the run's data with --data-root": "",
    "--run-dir": "run_dir",
    "--no-resume": "resume=False",
    "--epochs": "epochs",
    "the same command": "the same call",
}


def _in_words(text: str) -> str:
    for command_line, here in _WORDS.items():
        text = text.replace(command_line, here)
    return text


@contextmanager
def in_words_of_python() -> Iterator[None]:
    """Names arguments as `fit` does in errors of the trainer."""
    try:
        yield
    except (UserError, CannotWrite, Diverged) as error:
        error.args = (_in_words(str(error)),)
        raise


class FitProgress(Progress):
    """Also calls the callbacks."""

    def __init__(self, epochs: int, quiet: bool, callbacks: Sequence[Callable[[Row], Any]]) -> None:
        super().__init__(epochs, quiet)
        self.callbacks = callbacks

    def row(self, row: Row) -> None:
        super().row(row)
        for callback in self.callbacks:
            callback(row)

    def say(self, text: str) -> None:
        super().say(_in_words(text))

    def warn(self, text: str) -> None:
        super().warn(_in_words(text))
