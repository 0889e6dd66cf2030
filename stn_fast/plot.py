"""Plots the hyperparameter schedules and loss curves of one or several runs (python -m stn_fast.plot RUN_DIR...)."""

from __future__ import annotations

import io
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stn_fast.command_line import Parser, run_command
from stn_fast.errors import UserError
from stn_fast.extras import extra
from stn_fast.files import expanded
from stn_fast.hyperparameter import Hyperparameter
from stn_fast.terminal import printable
from stn_fast.training.reading import Row, Run, read_run, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "Run", "draw", "draw_history", "new_figure", "panels", "png", "read_run", "read_runs", "save", "save_schedule",
    "spelt",
]  # fmt: skip

# Okabe and Ito's palette: eight colours that colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A600")
GREY = "#555555"
PANEL = (3.7, 2.5)  # inches
COLUMNS = 3
TITLE = 24  # longest title of a panel, in characters, that leaves room beside it
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
    """The colour of run ``number``; colours repeat after the last one."""
    return COLOURS[number % len(COLOURS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure on matplotlib's Agg canvas, whatever MPLBACKEND says; width and height are in inches.

    matplotlib cannot be imported if MPLBACKEND is misspelt or names a backend that is not installed. So it is imported
    without MPLBACKEND; a valid backend is then set for pyplot, which is not used here.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with extra("matplotlib"):
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def warn(text: str) -> None:
    """Prints one line of warning on standard error."""
    print(f"warning: {printable(text)}", file=sys.stderr)


def save_schedule(
    directories: Sequence[str | Path], output: str | Path | None = None, warn: Callable[[str], None] = warn
) -> Path:
    """Plots the runs together; returns the file, by default ``schedule.png`` in the directory of a single run.

    If there are several directories, those without a valid run are left out, and ``warn`` is called with each reason.

    Raises:
        UserError: no directory holds a run, or the file cannot be written.
    """
    runs = read_runs(directories, warn)
    single = Path(directories[0]) / "schedule.png"
    return save(draw(runs), output if output is not None else single if len(directories) == 1 else "schedules.png")


def save(figure: Figure, output: str | Path, argument: str = "--output") -> Path:
    """Writes ``figure`` in the format given by the extension of ``output``, by default PNG; returns the file.

    Errors name the ``argument`` that the file was given by.

    All text is drawn literally: ``$`` does not begin a formula, and the user's settings cannot make TeX typeset it.

    Raises:
        UserError: the file or the format cannot be written.
    """
    target = expanded(output, argument)
    try:
        target = target if target.suffix else target.with_suffix(".png")
        _write(figure, target)
    except (OSError, ValueError) as error:
        raise UserError(f"{argument} {target} cannot be written ({error}); name a .png, .pdf or .svg file") from None
    return target


def png(figure: Figure) -> bytes:
    """The contents of a PNG file of ``figure``, drawn as by ``save``."""
    contents = io.BytesIO()
    _write(figure, contents, "png")
    return contents.getvalue()


def _write(figure: Figure, target: Path | io.BytesIO, form: str | None = None) -> None:
    """Writes ``figure`` with all text drawn literally; None as ``form`` is the format of the target's extension."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
    with rc_context({"text.parse_math": False, "text.usetex": False}):  # for ticks, which are created on drawing
        figure.savefig(target, dpi=150, format=form)


def draw(runs: Sequence[Run]) -> Figure:
    """One panel for the losses and one for each hyperparameter, all plotted over epochs."""
    names = list(dict.fromkeys(name for run in runs for name in run.config.enabled))
    top = 0.35 + 0.25 * -(-len(runs) // LEGEND_COLUMNS)
    figure, axes = _panels_over(1 + len(names), top, "epoch")
    draw_losses(axes[0], runs)
    for axis, name in zip(axes[1:], names, strict=True):
        draw_hyperparameter(axis, runs, name)
    _head(figure, runs, top)
    return figure


def draw_history(history: Sequence[Row], space: Sequence[Hyperparameter]) -> Figure:
    """One panel for the validation loss and one for each hyperparameter, over the training steps of `SelfTuner`.

    The dotted line is the first guess.
    """
    figure, axes = _panels_over(1 + len(space), 0.0, "training step")
    steps = [row["step"] for row in history]
    axes[0].plot(steps, [row["loss"] for row in history], color=COLOURS[0], linewidth=1.0)
    axes[0].set_title("validation loss", fontsize=10, loc="left")
    for axis, one in zip(axes[1:], space, strict=True):
        values = [row["values"][one.name] for row in history]
        axis.plot(steps, values, color=COLOURS[0], linewidth=1.7)
        axis.axhline(one.init, color=GREY, linestyle=":", linewidth=1)
        _scale(axis, [one])
        axis.set_title(spelt(one.name), fontsize=10, loc="left")
        axis.set_title(f"{one.init:.2g} → {values[-1]:.2g}", fontsize=9, loc="right", color=GREY)
    for axis in axes:
        _style(axis)
    return figure


def panels(
    count: int, head: float, size: tuple[float, float] = PANEL, *, least_width: float = 0.0, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of this ``size``, at most COLUMNS in a row, below a head; all in inches."""
    columns = min(COLUMNS, count)
    lines = -(-count // columns)
    figure = new_figure(max(size[0] * columns, least_width), size[1] * lines + head)
    below_head = (0, 0, 1, 1 - head / figure.get_figheight())
    figure.set_layout_engine("constrained", rect=below_head, w_pad=0.1, h_pad=0.08)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=sharex).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, list(axes[:count])


def _panels_over(count: int, head: float, label: str) -> tuple[Figure, list[Axes]]:
    """Panels with a common horizontal axis, which ``label`` names."""
    figure, axes = panels(count, head, sharex=True)
    for axis in axes[-COLUMNS:]:
        axis.set_xlabel(label)
        axis.tick_params(labelbottom=True)
    return figure, axes


def draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    """Training objective, validation loss and test loss in the task's unit; a dot marks the best validation loss."""
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
    if all(not row[key] <= 0 for run in runs for _, phase, key, _ in curves for row in run.rows[phase] if key in row):
        axis.set_yscale("log")
        plain_log_labels(axis.yaxis)
    axis.set_title("loss", fontsize=10, loc="left")
    units = dict.fromkeys(printable(run.loss_unit) for run in runs if run.loss_unit)
    axis.set_ylabel(", ".join(units), fontsize=8)
    legend = axis.legend(loc="lower right", bbox_to_anchor=(1.02, 1.0), **LEGEND)
    if len(runs) > 1:
        for handle in legend.get_lines():
            handle.set_color(GREY)
    _finish(axis, runs)


def draw_hyperparameter(axis: Axes, runs: Sequence[Run], name: str) -> None:
    """The constrained value over epochs, with a band from λ − σ to λ + σ; the dotted line is the first guess."""
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
    axis.set_title(spelt(name), fontsize=10, loc="left")
    if len(runs) == 1:
        path = f"{entries[0].init:.2g} → {runs[0].best['hyperparameters'][name]:.2g}"
        axis.set_title(path, fontsize=9, loc="right", color=GREY)
    _finish(axis, runs)


def spelt(name: str) -> str:
    """The name of a hyperparameter in words, in lines no longer than the title of a panel."""
    return textwrap.fill(printable(name).replace("_", " "), TITLE)


def _scale(axis: Axes, entries: Sequence[Any]) -> None:
    """A logarithmic axis for positive values without an upper bound, such as weight decay; else a linear one."""
    if all(entry.low == 0 and entry.high is None for entry in entries):
        axis.set_yscale("log")
        plain_log_labels(axis.yaxis)
    elif all(entry.low is not None and entry.high is not None for entry in entries):
        axis.set_ylim(bottom=min(entry.low for entry in entries))


def plain_log_labels(axis: Axis) -> None:
    """Numbers such as 0.05 on a log axis; between powers of ten only if few of these are visible."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _style(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.set_xlim(left=0)


def _finish(axis: Axes, runs: Sequence[Run]) -> None:
    _style(axis)
    warmups = {run.config.method.warmup_epochs for run in runs if run.config.method.tunes}
    if len(warmups) == 1 and (warmup := warmups.pop()):
        axis.axvspan(0, warmup, color="#000000", alpha=0.05, linewidth=0)


def _head(figure: Figure, runs: Sequence[Run], top: float) -> None:
    """A title or a legend of runs in the top ``top`` inches, and a line that explains the panels."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight()
    if len(runs) == 1:
        config, best = runs[0].config, runs[0].best
        title = f"{printable(config.recipe)}, {config.method.label}, seed {config.seed}: "
        title += f"best validation loss {best['loss']:.3f}"
        for score, form in (("test_accuracy", ".3f"), ("test_perplexity", ".1f")):
            if math.isfinite(best.get(score, math.nan)):
                title += f", {score.replace('_', ' ')} there {best[score]:{form}}"
        figure.text(0.5, 1 - 0.25 / height, title, ha="center", va="center", fontsize=12)
    else:
        handles = [Line2D([], [], color=colour_of(i), linewidth=2.5) for i in range(len(runs))]
        labels = [f"{printable(run.name)}: best validation loss {run.best['loss']:.3f}" for run in runs]
        place: dict[str, Any] = {
            "loc": "upper center",
            "bbox_to_anchor": (0.5, 1 - 0.05 / height),
            "borderaxespad": 0.0,
        }
        legend = figure.legend(handles, ["run"] * len(runs), ncols=LEGEND_COLUMNS, frameon=False, fontsize=10, **place)
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_text(label)  # set afterwards, because matplotlib omits labels that begin with _
    note = "line: value    band: ± σ of its perturbation    dot: best validation loss    dotted: first guess"
    shaded = "    shaded: warm-up" if any(run.config.method.tunes for run in runs) else ""
    figure.text(0.5, 1 - (top - 0.12) / height, note + shaded, ha="center", va="center", fontsize=8.5, color=GREY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, or 2 for a user's error."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    it = Parser("python -m stn_fast.plot", __doc__)
    it.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directories written by stn_fast.train")
    output = "PNG, PDF or SVG file (default: schedule.png in RUN_DIR; for several runs ./schedules.png)"
    it.add_argument("-o", "--output", metavar="FILE", help=output)
    flags = it.given(arguments)
    print(printable(str(save_schedule(flags["run_dirs"], flags["output"]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
