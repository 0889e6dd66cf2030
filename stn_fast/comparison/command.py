"""A whole comparison, from its settings to its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stn_fast import files
from stn_fast.comparison.figure import draw
from stn_fast.comparison.guesses import Guess, guessed
from stn_fast.comparison.plan import Comparison, circumstances, make_runs
from stn_fast.comparison.report import report
from stn_fast.comparison.search import SEARCHES, search_space
from stn_fast.comparison.sources import of_other_sources, sources_digest
from stn_fast.comparison.table import summarise
from stn_fast.errors import UserError
from stn_fast.extras import require
from stn_fast.plot import save
from stn_fast.recipes import RecipeLike
from stn_fast.terminal import printable
from stn_fast.training.config import Config
from stn_fast.training.progress import Progress
from stn_fast.values import to_json


def compare(
    place: str,
    module: RecipeLike,
    defaults: Config,
    methods: tuple[str, ...],
    guesses: Sequence[Guess],
    *,
    budget: int,
    seeds: int,
    jobs: int,
    out: str | None,
) -> str:
    """Makes the runs that are missing in ``out``, writes its files, and returns the tables as text.

    The files are ``runs.jsonl``, one row per run or trial; ``searches.journal``, Optuna's studies; ``compare.json``,
    all that the tables say, settings and versions; and ``compare.png``, the curves. Unfinished runs are in
    ``unfinished/``.

    Args:
        place, module, defaults: the recipe's name on the command line, the recipe, and its settings.
        methods, guesses, budget, seeds: as of `Comparison`.
        jobs: the number of runs at a time.
        out: the folder, by default ``runs/compare-RECIPE``.

    Raises:
        UserError: a setting or a file is wrong, or a package is missing.
        Stopped: by a signal; the same call continues.
    """
    searches = set(methods) & set(SEARCHES)
    for package in ("matplotlib", *(["optuna"] if searches else [])):
        require(package)  # fail before the runs rather than after them
    for guess in guesses:
        guessed(defaults, guess)
    if searches:
        search_space(defaults)
    name = re.sub(r"[^\w.-]", "_", defaults.recipe)
    say = Progress().say
    with folder(files.expanded(out or f"runs/compare-{name}", "--out")) as path:
        say("reading the data")
        own = circumstances(defaults, module)
        asked = Comparison(place, defaults, methods, tuple(guesses), budget, seeds, path, own)
        return write(asked, make_runs(asked, jobs, say))


def write(asked: Comparison, rows: Sequence[dict[str, Any]]) -> str:
    """Writes compare.json and compare.png; returns the tables and where the files are."""
    summary = summarise(rows)
    settings = {
        "recipe": asked.defaults.recipe,
        "methods": asked.methods,
        "guesses": asked.guesses,
        "budget": asked.budget,
        "seeds": asked.seeds,
        "config": asdict(replace(asked.defaults, data_root=None)),
        **asked.circumstances,
    }
    digest = sources_digest()
    settings["sources"] = digest
    contents = to_json({"settings": settings, **summary}, indent=2) + "\n"
    files.replace(asked.out / "compare.json", contents.encode())
    picture = save(draw(asked.defaults.recipe, rows), asked.out / "compare.png")
    parts = [report(summary), of_other_sources(rows, digest)]
    tables = "\n\n".join(part for part in parts if part)
    return f"{tables}\n\nRuns and tables are in {printable(str(asked.out))}, the curves in {picture.name}."


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """The folder of a comparison, made if missing and locked against others inside.

    Raises:
        UserError: it can't be made or written, or another comparison is using it.
    """
    with ExitStack() as stack:
        try:
            files.make_directory(path)
            stack.enter_context(files.locked(path / ".lock", wait=False))
        except files.Locked:
            raise UserError(f"another comparison is using {path}: wait for it, or choose another --out") from None
        except OSError as error:
            raise UserError(f"--out {path} can't be written ({error.strerror}): choose another folder") from None
        yield path
