"""Compares the same network from the same bad guess with tuned, fixed and frozen hyperparameters, over several seeds.

    python -m benchmarks.self_tuning digits --seeds 5
    python -m benchmarks.self_tuning digits --seeds 20 --methods stn --learning-rate-factor 2
    python -m benchmarks.self_tuning fashion-mnist-small --seeds 3 --methods stn fixed --guesses .05 .5 --jobs 2
    python -m benchmarks.self_tuning ptb-small --seeds 2 --guesses .05 .6 --jobs 2

Prints one row for every run, medians, the ratios of validation and test losses (perplexities for texts), the number of
runs that became non-finite, and where the hyperparameters end. With --out, a command that is stopped continues where it
stopped.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from stn_fast.command_line import run_command
from stn_fast.comparison.guesses import dropout_rates, guessed
from stn_fast.comparison.kept_runs import KeptRuns, Row
from stn_fast.comparison.runs import METHODS, configure, digest, measured, score
from stn_fast.errors import UserError
from stn_fast.files import expanded
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import Config, as_published
from stn_fast.training.layering import resolve
from stn_fast.values import to_json

KEY = ("recipe", "method", "guess", "seed", "settings")
COLUMNS = {
    "valid_loss": "valid loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "moved": "moved > σ",
    "wall_seconds": "seconds",
}
COLUMNS_OF_TEXTS = {
    "valid_perplexity": "valid perplexity",
    "test_perplexity": "test perplexity",
    "moved": "moved > σ",
    "wall_seconds": "seconds",
}
COMPARED = {
    "valid_loss": "best validation loss",
    "test_loss": "test loss there",
    "valid_perplexity": "best validation perplexity",
    "test_perplexity": "test perplexity there",
}


def table(title: str, results: Sequence[Row]) -> str:
    """One line for every run and one for the median."""
    finite = [result for result in results if not result["diverged"]]
    columns = COLUMNS_OF_TEXTS if any("test_perplexity" in result for result in finite) else COLUMNS
    widths = [max(13, len(head)) for head in columns.values()]

    def line(start: str, cells: Iterable[str]) -> str:
        return f"{start:>15}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=False))

    lines = [line(title, columns.values())]
    for result in results:
        cells = ["not finite"] if result["diverged"] else [f"{score(result, key):.4g}" for key in columns]
        lines.append(line(f"seed {result['seed']:>2}", cells))
    if finite:
        lines.append(line("median", (f"{statistics.median(score(run, key) for run in finite):.4g}" for key in columns)))
    lines.append(f"{'':>15}  {len(results) - len(finite)} of {len(results)} runs turned non-finite")
    return "\n".join(lines)


def median_score(results: Sequence[Row], key: str) -> float:
    """Median over runs of ``key`` at the best validation loss; infinite for a run that became non-finite."""
    return statistics.median(score(result, key) for result in results)


def ratios(one: Sequence[Row], other: Sequence[Row], says: str) -> list[str]:
    """One line for every score by which runs are compared."""
    of_text = any("test_perplexity" in result for result in [*one, *other])
    return [
        f"{says.format(what)}: {median_score(one, key) / median_score(other, key):.3f}"
        for key, what in COMPARED.items()
        if key.endswith("perplexity") == of_text
    ]


def comparisons(runs: Mapping[tuple[str, float | None], Sequence[Row]]) -> list[str]:
    """stn with the other methods from every guess, then stn with fixed hyperparameters from another guess.

    ``runs`` are by method and guess.
    """
    guesses = list(dict.fromkeys(guess for _, guess in runs))
    lines = []
    for guess in guesses:
        start = "" if guess is None else f"from dropout {guess:g}: "
        for method in (method for method in METHODS if method != "stn"):
            if ("stn", guess) in runs and (method, guess) in runs:
                says = f"{start}{{}}, median of stn / median of {method}"
                lines += ratios(runs["stn", guess], runs[method, guess], says)
    for guess, other in itertools.permutations(guesses, 2):
        if ("stn", guess) in runs and ("fixed", other) in runs:
            says = f"{{}}, median of stn from dropout {guess:g} / median of fixed from dropout {other:g}"
            lines += ratios(runs["stn", guess], runs["fixed", other], says)
    return lines


def spreads(runs: Mapping[tuple[str, float | None], Sequence[Row]]) -> list[str]:
    """Where hyperparameters end: a line for each hyperparameter of each method, over all seeds and guesses."""
    lines = [f"{'at the end':>15}  {'mean':>10}  {'deviation':>10}  range, over all seeds and guesses"]
    for method in dict.fromkeys(method for method, _ in runs):
        finite = [run for (of, _), group in runs.items() if of == method for run in group if not run["diverged"]]
        lines.append(f"{method:>15}")
        for name in finite[0]["hyperparameters_end"] if finite else ():
            values = [run["hyperparameters_end"][name] for run in finite]
            middle, deviation = statistics.mean(values), statistics.pstdev(values)
            lines.append(
                f"{'':>15}  {middle:>10.4g}  {deviation:>10.3g}  {min(values):.4g} to {max(values):.4g}  {name}"
            )
    return lines


def parser() -> argparse.ArgumentParser:
    it = argparse.ArgumentParser(prog="python -m benchmarks.self_tuning", description=__doc__.splitlines()[0])
    it.add_argument("recipe", nargs="?", default="digits", choices=list(RECIPES))
    it.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    it.add_argument(
        "--guesses", nargs="+", type=float, metavar="RATE",
        help="first guess of every dropout rate; other hyperparameters keep the recipe's guess (default: recipe's)",
    )  # fmt: skip
    it.add_argument("--learning-rate-factor", type=float, default=1.0, help="multiplies both learning rates")
    it.add_argument("--as-published", action="store_true", help="start the response and take steps as the papers do")
    it.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override any key of the recipe")
    it.add_argument("--out", metavar="FILE", help="JSON lines: finished runs are added, and not made again")
    add_run_flags(it, seeds=5)
    return it


def add_run_flags(it: argparse.ArgumentParser, seeds: int) -> None:
    """The flags of a command that makes runs; ``seeds`` is the default number of seeds."""
    it.add_argument("--seeds", type=int, default=seeds, help="seeds 0 to N - 1 (default: %(default)s)")
    it.add_argument("--epochs", type=int, help="epochs of each run (default: the recipe's)")
    it.add_argument("--jobs", type=int, default=1, help="parallel runs, which share the CPU's threads (default: 1)")
    it.add_argument("--data-root", metavar="DIR", default=os.environ.get("STN_FAST_DATA"), help="data sets' folder")
    it.add_argument("--run-dir", metavar="DIR", help="keep the runs in this folder (default: don't keep them)")
    it.add_argument("--json", metavar="FILE", help="write every result here")


def writable(path: str, flag: str) -> Path:
    """A file that ``flag`` names, which runs will be written to when they end, hours later.

    Raises:
        UserError: it can't be written.
    """
    file = expanded(path, flag)
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise UserError(f"{flag} {file} can't be written: choose a file in a folder that exists and may be written to")
    return file


def check_run_flags(it: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Ends the command with a message if --jobs or --seeds is not a positive number, or --json can't be written."""
    if flags.jobs < 1 or flags.seeds < 1:
        it.error(f"--jobs and --seeds must be at least 1; got {flags.jobs} and {flags.seeds}")
    try:
        if flags.json:
            writable(flags.json, "--json")
    except UserError as error:
        it.error(str(error))


def sharing(defaults: Config, jobs: int) -> Config:
    """``defaults`` with at most as many threads as there are for each of ``jobs`` parallel runs."""
    if jobs == 1:
        return defaults
    share = max(1, (os.cpu_count() or 1) // jobs)
    return replace(defaults, threads=min(share, defaults.threads or share))


def compare(flags: argparse.Namespace, defaults: Config) -> dict[str, list[Row]]:
    """Makes the runs that are not in --out yet and prints all that are asked for; returns the results by method."""
    guesses: list[float | None] = flags.guesses or [None]
    if flags.guesses:
        print(f"a guess is where these start: {', '.join(dropout_rates(defaults))}\n")
    kept = KeptRuns(writable(flags.out, "--out") if flags.out else None, KEY)
    with tempfile.TemporaryDirectory() as scratch:
        asked, missing = [], []
        for seed, guess, method in itertools.product(range(flags.seeds), guesses, flags.methods):
            name = f"{method}-seed{seed}" + ("" if guess is None else f"-from{guess:g}")
            target = Path(flags.run_dir or scratch) / name
            base = guessed(defaults, guess)
            config = configure(base, method, seed, flags.learning_rate_factor, target, flags.epochs)
            run = {"recipe": flags.recipe, "method": method, "guess": guess, "seed": seed, "settings": digest(config)}
            asked.append(run)
            if kept.find(run) is None:
                missing.append((run, config))
        with measured([config for _, config in missing], flags.jobs) as coming:
            for number, ((run, config), result) in enumerate(zip(missing, coming, strict=True), 1):
                kept.add({**result, **run, "set": flags.set})
                print(f"run {number} of {len(missing)} finished: {Path(config.directory).name}", flush=True)
    runs: dict[tuple[str, float | None], list[Row]] = {}
    for guess, method in itertools.product(guesses, flags.methods):
        chosen = (kept.find(run) for run in asked if (run["method"], run["guess"]) == (method, guess))
        runs[method, guess] = [run for run in chosen if run is not None]
        title = method if guess is None else f"{method} from {guess:g}"
        print(table(title, runs[method, guess]) + "\n", flush=True)
    print("\n".join([*spreads(runs), "", *comparisons(runs)]))
    return {
        method: [result for (of, _), results in runs.items() if of == method for result in results]
        for method in flags.methods
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and prints; returns 0."""
    it = parser()
    flags = it.parse_args(arguments)
    check_run_flags(it, flags)
    defaults = sharing(replace(recipe(flags.recipe).config(), data_root=flags.data_root), flags.jobs)
    if flags.as_published:
        defaults = as_published(defaults)
    try:
        if flags.set:  # without it, `auto` stays in the digests of settings by which finished runs are found
            defaults = resolve(defaults, pairs=flags.set)
        results = compare(flags, defaults)
    except UserError as error:
        it.error(str(error))
    if flags.json:
        expanded(flags.json, "--json").write_text(to_json(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
