"""``python -m stn_fast.train``: trains a recipe and writes a run directory."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from stn_fast.command_line import Parser, complain, number, run_command, whole_number
from stn_fast.errors import UserError
from stn_fast.extras import require
from stn_fast.recipes import RECIPES, recipe
from stn_fast.terminal import printable
from stn_fast.training.config import FLAGS, METHODS, ConfigError
from stn_fast.training.layering import read_yaml, resolve, to_yaml

PROGRAM = "python -m stn_fast.train"
DEFAULT_RECIPE = "digits"


def parser() -> Parser:
    """The flags. A flag that overrides a key of the configuration has that key as its ``dest``."""
    about = "Trains a self-tuning network, or the same network without tuning."
    it = Parser(PROGRAM, about)
    flag = it.add_argument
    default = f"the recipe in --config, else {DEFAULT_RECIPE}"
    flag("recipe", nargs="?", help=f"what to train: {', '.join(RECIPES)}, or FILE.py:NAME (default: {default})")
    flag("--method", dest="method.name", metavar="NAME", help=f"{', '.join(METHODS)} (default: stn)")
    frozen = "train the self-tuning network without tuning its hyperparameters"
    flag("--freeze", dest="method.freeze", action="store_true", default=None, help=frozen)
    flag("--seed", type=whole_number, metavar="N", help="seed of all random numbers (default: 0)")
    flag("--device", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    flag("--epochs", dest="schedule.epochs", type=whole_number, metavar="N", help="passes over the training set")
    flag("--max-steps", dest="schedule.max_steps", type=whole_number, metavar="N", help="stop after N steps")
    share = "fraction of the training set to use, above 0 and at most 1 (default: 1)"
    flag("--train-fraction", dest="train_fraction", type=number, metavar="F", help=share)
    root = "folder of the data sets; missing ones are downloaded (default: $STN_FAST_DATA, else ~/.cache/stn_fast/data)"
    flag("--data-root", dest="data_root", metavar="DIR", help=root)
    flag("--run-dir", dest="run_dir", metavar="DIR", help="output directory (default: runs/RECIPE-METHOD-seedSEED)")
    flag("--config", metavar="FILE", help="YAML file that overrides the recipe's defaults; see --print-config")
    override = "override any key, e.g. optimizer.learning_rate=0.1; may be repeated"
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    flag("--print-config", action="store_true", help="print the resolved configuration as YAML and exit")
    resume = "continue from the newest checkpoint in the run directory (default); --no-resume starts over"
    flag("--resume", action=argparse.BooleanOptionalAction, default=True, help=resume)
    return it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 1, 2 for a user's error, 130 or 143 after a signal."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    flags = parser().given(arguments)
    file = flags["config"]
    settings = {} if file is None else read_yaml(file)
    module = recipe(recipe_name(flags["recipe"], settings, file))
    overrides = {key: flags[key] for key in FLAGS if flags.get(key) is not None and key != "recipe"}
    config = resolve(module.config(), file, flags["set"], overrides, settings=settings)
    if flags["print_config"]:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return train(config, module, flags["resume"])


def recipe_name(argument: str | None, settings: Mapping[str, Any], file: str | None) -> str:
    """The recipe named by the first ``argument``, or by the ``settings`` in the --config ``file``.

    Raises:
        UserError: the two name different recipes, or the name in the settings is not text.
    """
    if "recipe" not in settings:
        return argument or DEFAULT_RECIPE
    named = settings["recipe"]
    if not isinstance(named, str):
        raise ConfigError("recipe", named, f"must be the name of a recipe in {file}: {', '.join(RECIPES)}")
    if argument is not None and argument not in RECIPES:
        return argument  # a user's recipe, which has its own name in its configuration
    if argument is not None and argument != named:
        raise UserError(
            f"the first argument is the recipe '{argument}', but {file} is for '{named}': leave out the argument, "
            "or choose another --config"
        )
    return named


def train(config: Any, module: Any, resume: bool) -> int:
    """Runs ``config``, prints the result and plots the schedules; returns the exit status."""
    require("matplotlib")  # fail before the run rather than after it
    from stn_fast.plot import save_schedule
    from stn_fast.training.distributed import ProcessesDiffer, first_of, launched, lost
    from stn_fast.training.progress import Progress, summary
    from stn_fast.training.run import run
    from stn_fast.training.signals import Interrupted
    from stn_fast.training.trainer import Diverged

    with launched(config.device) as processes:
        first = first_of(processes)
        progress = Progress(config.schedule.epochs, quiet=not first, warns=first)
        try:
            result = run(config, module.build, resume=resume, progress=progress, processes=processes)
        except Interrupted as stop:
            if first:
                print(printable(f"{stop} in {config.directory}; the same command resumes it"), file=sys.stderr)
            return stop.exit_status
        except Diverged as error:
            return complain(str(error), 1) if first else 1
        except ProcessesDiffer as error:
            return complain(str(error), 1)
        except RuntimeError as error:
            if processes is None or not lost(error):
                raise
            said = f"another process has ended or does not answer ({textwrap.shorten(str(error), 200)})"
            return complain(f"{said}; the same command continues from the last checkpoint in {config.directory}", 1)
    if not first:
        return 0
    print(summary(result))
    schedule = save_schedule([config.directory])
    files = f"results are in {config.directory}, the schedules in {schedule}"
    print(f"{result['wall_seconds']:.1f} s; {printable(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
