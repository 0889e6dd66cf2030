"""``python -m stn_fast.plot RUN_DIR...``: draws hyperparameter schedules and loss curves of one run or several."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stn_fast.command_line import Parser
from stn_fast.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stn_fast.training.config import Config

# Okabe and Ito's palette: eight colours that stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600")
GREY = "#555555"
PANEL = (3.7, 2.5)  # inches
COLUMNS = 3
TITLE = 24  # characters of a panel's title that leave room beside them
LEGEND_COLUMNS = 2
LEGEND: dict[str, Any] = {
    "ncols": 3,
    "columnspacing": 0.9,
    "handlelength": 1.5,
    "handletextpad": 0.4,
    "borderaxespad": 0.2,
    "fontsize": 8,
    "frameon": False,
}


def colour_of(number: int) -> str:
    """The colour of run ``number``; they repeat after the last."""
    return COLOURS[number % len(COLOURS)]


class Run(NamedTuple):
    """A run directory's configuration and its rows by phase."""

    name: str
    config: Config
    rows: dict[str, list[dict[str, Any]]]

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the lowest validation loss."""
        return min(self.rows["eval"], key=lambda row: row["loss"])


def read_run(directory: str | Path) -> Run:
    """What ``directory`` holds.

    Raises:
        UserError: there is no such directory, it holds no run, or no evaluation has been written yet.
    """
    from stn_fast.training.config import Config
    from stn_fast.training.layering import build, read_yaml

    path = Path(directory)
    metrics = path / "metrics.jsonl"
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}; python -m stn_fast.train makes one under runs/")
    if not metrics.is_file():
        raise UserError(f"{path} holds no metrics.jsonl; name a directory that python -m stn_fast.train has written")
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "eval": []}
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["phase"]].append(row)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"line {number} of {metrics} is not a row of metrics; remove it") from None
    if not rows["eval"]:
        raise UserError(f"{metrics} holds no evaluation yet; let the run finish its first epoch")
    return Run(path.name or str(path), build(Config, read_yaml(str(path / "config.yaml"))), rows)


def save_schedule(directories: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Draws the runs over each other into a PNG; by default ``schedule.png`` in the run's own directory.

    Raises:
        UserError: a directory holds no run, or the picture cannot be written.
    """
    runs = [read_run(directory) for directory in directories]
    single = Path(directories[0]) / "schedule.png"
    target = Path(output) if output is not None else single if len(runs) == 1 else Path("schedules.png")
    return save(draw(runs), target)


def save(figure: Figure, target: Path) -> Path:
    """Writes ``figure`` in the format that the ending of ``target`` names, and returns that.

    Raises:
        UserError: it cannot be written there, or not in that format.
    """
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {target} cannot be written ({error}); name a .png, .pdf or .svg file") from None
    return target


def draw(runs: Sequence[Run]) -> Figure:
    """One panel for the losses and one for every hyperparameter, all over epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.config.enabled))
    panels = 1 + len(names)
    columns = min(COLUMNS, panels)
    lines = -(-panels // columns)
    top = 0.35 + 0.25 * -(-len(runs) // LEGEND_COLUMNS)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + top))
    FigureCanvasAgg(figure)
    below_head = (0, 0, 1, 1 - top / figure.get_figheight())
    figure.set_layout_engine("constrained", rect=below_head, w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    draw_losses(axes[0], runs)
    for axis, name in zip(axes[1:], names, strict=False):
        draw_hyperparameter(axis, runs, name)
    for axis in axes[panels:]:
        axis.set_visible(False)
    for axis in axes[max(0, panels - columns) : panels]:
        axis.set_xlabel("epoch")
        axis.tick_params(labelbottom=True)
    _head(figure, runs, top)
    return figure


def draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    """Training objective, validation loss and test loss in nats; a dot marks the best validation loss."""
    curves = (
        ("train (regularised)", "train", "loss", ":"),
        ("valid", "eval", "loss", "-"),
        ("test", "eval", "test_loss", "--"),
    )
    for number, run in enumerate(runs):
        for index, (label, phase, key, style) in enumerate(curves):
            rows = [row for row in run.rows[phase] if key in row]
            colour = colour_of(number) if len(runs) > 1 else (GREY, *COLOURS)[index]
            axis.plot(
                [row["epoch"] for row in rows],
                [row[key] for row in rows],
                style,
                color=colour,
                linewidth=1.4,
                label=label if number == 0 else None,
            )
        colour = colour_of(number)
        axis.plot(run.best["epoch"], run.best["loss"], "o", color=colour, markersize=5, zorder=5)
    axis.set_yscale("log")
    _plain_log_labels(axis)
    axis.set_title("loss", fontsize=10, loc="left")
    axis.set_ylabel("nats", fontsize=8)
    legend = axis.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), **LEGEND)
    if len(runs) > 1:
        for handle in legend.get_lines():
            handle.set_color(GREY)
    _finish(axis, runs)


def draw_hyperparameter(axis: Axes, runs: Sequence[Run], name: str) -> None:
    """The constrained value over epochs in the band from λ − σ to λ + σ; the dotted line is the first guess."""
    for number, run in enumerate(runs):
        rows = [row for row in run.rows["eval"] if name in row.get("hyperparameters", {})]
        if not rows:
            continue
        epochs = [row["epoch"] for row in rows]
        low, value, high = ([row[f"hyperparameters{part}"][name] for row in rows] for part in ("_low", "", "_high"))
        colour = colour_of(number)
        axis.fill_between(epochs, low, high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(epochs, value, color=colour, linewidth=1.7)
        axis.plot(run.best["epoch"], run.best["hyperparameters"][name], "o", color=colour, markersize=5, zorder=5)
    entries = [run.config.enabled[name] for run in runs if name in run.config.enabled]
    for init in {entry.init for entry in entries}:
        axis.axhline(init, color=GREY, linestyle=":", linewidth=1)
    _scale(axis, entries)
    axis.set_title(textwrap.fill(name.replace("_", " "), TITLE), fontsize=10, loc="left")
    if len(runs) == 1:
        path = f"{entries[0].init:.2g} → {runs[0].best['hyperparameters'][name]:.2g}"
        axis.set_title(path, fontsize=9, loc="right", color=GREY)
    _finish(axis, runs)


def _scale(axis: Axes, entries: Sequence[Any]) -> None:
    """A logarithmic axis for what is positive and unbounded, such as weight decay; else from bound to data."""
    if all(entry.low == 0 and entry.high is None for entry in entries):
        axis.set_yscale("log")
        _plain_log_labels(axis)
    elif all(entry.low is not None and entry.high is not None for entry in entries):
        axis.set_ylim(bottom=min(entry.low for entry in entries))


def _plain_log_labels(axis: Axes) -> None:
    """Numbers such as 0.05 on a log axis; between the powers of ten only where few of those are in sight."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _finish(axis: Axes, runs: Sequence[Run]) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.set_xlim(left=0)
    warmups = {run.config.method.warmup_epochs for run in runs if run.config.method.tunes}
    if len(warmups) == 1 and (warmup := warmups.pop()):
        axis.axvspan(0, warmup, color="#000000", alpha=0.05, linewidth=0)


def _head(figure: Figure, runs: Sequence[Run], top: float) -> None:
    """A title or a legend of runs in the uppermost ``top`` inches, and a line that says how to read the panels."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight()
    if len(runs) == 1:
        config, best = runs[0].config, runs[0].best
        title = f"{config.recipe}, {config.method.label}, seed {config.seed}: best validation loss {best['loss']:.3f}"
        title += f", test accuracy there {best['test_accuracy']:.3f}" if "test_accuracy" in best else ""
        title += f", test perplexity there {best['test_perplexity']:.1f}" if "test_perplexity" in best else ""
        figure.text(0.5, 1 - 0.25 / height, title, ha="center", va="center", fontsize=12)
    else:
        handles = [Line2D([], [], color=colour_of(i), linewidth=2.5) for i in range(len(runs))]
        labels = [f"{run.name}: best validation loss {run.best['loss']:.3f}" for run in runs]
        place: dict[str, Any] = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, 1 - 0.05 / height),
            "borderaxespad": 0.0,
        }
        figure.legend(handles, labels, ncols=LEGEND_COLUMNS, frameon=False, fontsize=10, **place)
    note = "line: value    band: ± σ of its perturbation    dot: best validation loss    dotted: first guess"
    shaded = "    shaded: warm-up" if any(run.config.method.tunes for run in runs) else ""
    figure.text(0.5, 1 - (top - 0.12) / height, note + shaded, ha="center", va="center", fontsize=8.5, color=GREY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, or 2 for a user's error."""
    it = Parser("python -m stn_fast.plot", __doc__)
    it.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directories that stn_fast.train has written")
    output = "PNG, PDF or SVG (default: schedule.png in the run's directory; schedules.png here for several)"
    it.add_argument("--output", metavar="FILE", help=output)
    try:
        flags = it.given(arguments)
        print(save_schedule(flags["run_dirs"], flags["output"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
