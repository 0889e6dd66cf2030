"""``python -m stn_fast.compare``: compares self-tuning with fixed hyperparameters and with searches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from stn_fast.command_line import Parser, complain, run_command, whole_number
from stn_fast.comparison.guesses import read_guesses
from stn_fast.comparison.processes import Stopped
from stn_fast.comparison.runs import METHODS as FROM_GUESSES
from stn_fast.comparison.search import SEARCHES
from stn_fast.errors import UserError, did_you_mean
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.layering import flatten, read_pair, resolve

PROGRAM = "python -m stn_fast.compare"
METHODS = (*FROM_GUESSES, *SEARCHES)
OWN_KEYS = {"method.name": "--methods", "method.freeze": "--methods", "seed": "--seeds", "run_dir": "--out"}


def parser() -> Parser:
    """The flags."""
    about = (
        "Trains a recipe by several methods from several guesses of its hyperparameters, and by searches whose trials "
        "are runs with fixed hyperparameters; prints and plots the best losses over CPU time. The same command "
        "continues where it was stopped."
    )
    it = Parser(PROGRAM, about)
    flag = it.add_argument
    flag("recipe", help=f"what to train: {', '.join(RECIPES)}, or FILE.py:NAME")
    known = ", ".join(METHODS)
    one_pass = "one-pass sets hyper_optimizer, method.train_steps and the decay of the learning rate itself"
    flag("--methods", default=",".join(METHODS), metavar="LIST", help=f"of {known} (default: all); {one_pass}")
    starts = (
        "of low, middle, high (5 %%, 30 %%, 65 %% of a range; a tenth of, once, ten times the recipe's distance from a "
        "single bound), recipe, or a number for every dropout rate (default: %(default)s)"
    )
    flag("--guesses", default="low,middle,high", metavar="LIST", help=starts)
    flag("--budget", type=whole_number, default=10, metavar="TRIALS", help="of each search (default: %(default)s)")
    flag("--seeds", type=whole_number, default=3, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    flag("--jobs", type=whole_number, default=1, metavar="N", help="parallel runs (default: %(default)s)")
    flag("--epochs", type=whole_number, metavar="N", help="epochs of every run (default: the recipe's)")
    sets = (
        "override any key of the recipe, but for those that one-pass sets itself; threads is 1 unless it is set here, "
        "and the device must be cpu"
    )
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help=sets)
    flag("--data-root", metavar="DIR", help="folder of the data sets (default: as for python -m stn_fast.train)")
    flag("--out", metavar="DIR", help="folder of all results (default: runs/compare-RECIPE)")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for a user's error, 130 or 143 after a signal."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    flags = parser().given(arguments)
    methods = read_methods(flags["methods"])
    for name in ("budget", "seeds", "jobs"):
        if flags[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {flags[name]}")
    for pair in flags["set"]:
        check_pair(pair)
    guesses = read_guesses(flags["guesses"])
    module = recipe(flags["recipe"])
    overrides = {"schedule.epochs": flags["epochs"], "data_root": flags["data_root"]}
    defaults = resolve(
        replace(module.config(), threads=1),
        pairs=flags["set"],
        flags={key: value for key, value in overrides.items() if value is not None},
    )
    if defaults.device != "cpu":
        raise UserError(
            f"device = {defaults.device}: must be cpu, as methods are compared by CPU time; --set device=cpu"
        )
    from stn_fast.comparison.command import compare

    sizes = {name: flags[name] for name in ("budget", "seeds", "jobs")}
    try:
        print(compare(flags["recipe"], module, defaults, methods, guesses, out=flags["out"], **sizes))
    except Stopped as stop:
        return complain(f"{stop}; the same command continues", stop.exit_status)
    return 0


def read_methods(text: str) -> tuple[str, ...]:
    """The methods in a list such as ``stn,fixed``, each once.

    Raises:
        UserError: one is unknown.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name!r}: {did_you_mean(name, METHODS)}")
    return tuple(dict.fromkeys(names))


def check_pair(pair: str) -> None:
    """Checks that a ``--set`` pair, such as ``method={name: stn}``, sets no key that has a flag of its own.

    Raises:
        UserError: it does.
    """
    for key in flatten(read_pair(pair)):
        if key in OWN_KEYS:
            raise UserError(f"--set {pair}: {key} is set by {OWN_KEYS[key]}")


if __name__ == "__main__":
    sys.exit(main())
