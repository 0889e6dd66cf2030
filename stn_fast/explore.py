"""``python -m stn_fast.explore RUN_DIR``: draws the validation loss that a run's learnt response predicts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from stn_fast.command_line import Parser, number, run_command, whole_number
from stn_fast.errors import UserError
from stn_fast.files import expanded
from stn_fast.recipes import RECIPES, RecipeLike, recipe
from stn_fast.training.config import Config
from stn_fast.training.reading import read_run

PROGRAM = "python -m stn_fast.explore"
RANGES = {"points": (3, 1000), "span": (2, 20), "examples": (1, 2**62)}


def parser() -> Parser:
    """The flags."""
    about = (
        "Draws the validation loss of a self-tuned run against each of its hyperparameters, without training: the "
        "weights change as the run's learnt response predicts. Writes explore.png, explore.json and explore.html, and "
        "prints a table of sensitivities."
    )
    it = Parser(PROGRAM, about)
    flag = it.add_argument
    flag("run_dir", metavar="RUN_DIR", help="run directory written by stn_fast.train; the run may still be running")
    flag("--points", type=whole_number, default=21, metavar="N", help="points of a curve (default: %(default)s)")
    span = "how far curves reach from the run's value, in multiples of σ (default: 4)"
    flag("--span", type=number, default=4.0, metavar="S", help=span)
    examples = "most validation examples (for a text, words) to evaluate at each point (default: %(default)s)"
    flag("--examples", type=whole_number, default=5000, metavar="N", help=examples)
    pairs = "draw a map of the two hyperparameters that matter most (default)"
    flag("--pairs", action=argparse.BooleanOptionalAction, default=True, help=pairs)
    flag("--best", action="store_true", help="explore the checkpoint with the lowest validation loss, not the newest")
    own = "the run's recipe, if it is your own: FILE.py:NAME (default: the one that the run names)"
    flag("--recipe", metavar="RECIPE", help=own)
    flag("--device", metavar="DEVICE", help="cpu or cuda (default: the run's)")
    flag("--data-root", metavar="DIR", help="folder of the data sets (default: the run's)")
    flag("--out", metavar="DIR", help="folder of the three files (default: RUN_DIR)")
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, or 2 for a user's error."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    flags = parser().given(arguments)
    for name, (low, high) in RANGES.items():
        if not low <= flags[name] <= high:
            raise UserError(f"--{name} {flags[name]}: must be from {low} to {high}")
    path = expanded(flags["run_dir"], "RUN_DIR")
    run = read_run(path)
    changed = {key: flags[key] for key in ("device", "data_root") if flags[key] is not None}
    run = run._replace(config=replace(run.config, **changed))
    module = recipe_of(run.config, flags["recipe"], str(path))
    from stn_fast.exploration.command import explore

    out = path if flags["out"] is None else expanded(flags["out"], "--out")
    options = {name: flags[name] for name in (*RANGES, "pairs", "best")}
    print(explore(path, run, module.build, out=out, **options))
    return 0


def recipe_of(config: Config, place: str | None, path: str) -> RecipeLike:
    """The recipe of the run in ``path``, which is at ``place`` if that is given.

    Raises:
        UserError: there is no such recipe, it is not that of the run, or the run is one of `stn_fast.fit`.
    """
    if config.fit is not None:
        raise UserError(
            f"{path} holds a run of stn.fit, whose model, loss and loaders are only in the program that called it: "
            f"there, call stn.explore_model(stn.load({path!r}, model), valid_loader, loss=loss)"
        )
    if place is None and config.recipe not in RECIPES:
        raise UserError(f"{path} holds a run of your own recipe '{config.recipe}': name it by --recipe FILE.py:NAME")
    module = recipe(place or config.recipe)
    if place is not None and (name := module.config().recipe) != config.recipe:
        raise UserError(f"--recipe {place}: {path} holds a run of the recipe '{config.recipe}', not of '{name}'")
    return module


if __name__ == "__main__":
    sys.exit(main())
