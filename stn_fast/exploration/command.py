"""A whole exploration, from a run directory to its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stn_fast import files
from stn_fast.errors import UserError
from stn_fast.exploration.figure import draw
from stn_fast.exploration.report import numbers, page, table
from stn_fast.exploration.response import Exploration, explored
from stn_fast.exploration.restoring import restored
from stn_fast.extras import require
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.plot import png
from stn_fast.terminal import printable
from stn_fast.training.config import Config
from stn_fast.training.progress import Progress
from stn_fast.training.reading import Run
from stn_fast.training.run import using_threads
from stn_fast.training.task import Task
from stn_fast.values import to_json

FILES = ("explore.png", "explore.json", "explore.html")


def explore(
    path: Path,
    run: Run,
    build_task: Callable[[Config], Task],
    *,
    out: Path,
    points: int = 21,
    span: float = 4.0,
    examples: int = 5000,
    pairs: bool = True,
    best: bool = False,
) -> str:
    """Explores the ``run`` in ``path``, writes the three files into ``out``, and returns the table as text.

    Other arguments are those of ``explored`` and ``restored``.

    Raises:
        UserError: as ``explored`` and ``restored``, or ``out`` can't be written.
    """
    require("matplotlib")  # fail before the evaluations rather than after them
    progress = Progress()
    with using_threads(run.config.threads):
        trainer = restored(path, run.config, build_task, progress.warn, best=best)
        check_writable(out)
        unit = trainer.task.batching.unit
        whole = trainer.task.data.valid.examples
        progress.say(f"evaluating {min(examples, whole):,} of {whole:,} validation {unit} at each point")
        found = explored(trainer, points=points, span=span, examples=examples, pairs=pairs)
    recorded = recorded_loss(run, trainer.step)
    config = run.config
    title = f"{config.recipe}, {config.method.label}, seed {config.seed}: step {trainer.step}"
    about = f"Validation loss {found.loss:.4f} on {found.examples:,} of {found.validation_examples:,} {unit}" + (
        "; the run recorded none at this step." if recorded is None else f"; the run recorded {recorded:.4f} on all."
    )
    unit_of_loss = trainer.task.loss_unit
    settings = {"recipe": config.recipe, "method": config.method.label, "seed": config.seed, "step": trainer.step}
    settings |= {"points": points, "span": span, "loss_unit": unit_of_loss, "recorded_loss": recorded}
    write(found, trainer.method.space, out, title=title, about=about, settings=settings, loss_unit=unit_of_loss)
    where = printable(str(out))
    return f"{printable(title)}\n{about}\n\n{table(found.curves)}\n\n{', '.join(FILES)} are in {where}."


def write(
    found: Exploration,
    space: HyperparameterSpace,
    out: Path,
    *,
    title: str,
    about: str,
    settings: Mapping[str, Any],
    loss_unit: str = "",
) -> None:
    """Writes the three files; ``settings`` come first in the JSON."""
    picture = png(draw(found, space, f"{title}, loss {found.loss:.4f}", loss_unit))
    contents = to_json({**settings, **numbers(found)}, indent=2) + "\n"
    text = page(title, about, found.curves, picture)
    for name, written in zip(FILES, (picture, contents.encode(), text.encode()), strict=True):
        files.replace(out / name, written)


def recorded_loss(run: Run, step: int) -> float | None:
    """The validation loss that the run evaluated after ``step`` steps; None if it did not."""
    return next((row["loss"] for row in reversed(run.rows["eval"]) if row.get("step") == step), None)


def check_writable(out: Path, name: str = "--out") -> None:
    """Makes the folder if it is missing; ``name`` is that of the argument in errors.

    Raises:
        UserError: no file can be written there.
    """
    try:
        files.make_directory(out)
        for file in FILES:
            if files.is_directory(out / file):
                raise UserError(f"{name} {out} has a folder {file}: choose another folder")
            with files.beside(out / file) as probe:
                probe.touch()
    except OSError as error:
        raise UserError(f"{name} {out} can't be written ({error.strerror}): choose another folder") from None
