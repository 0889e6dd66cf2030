"""Progress bar, log lines and final summary of a run."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from stn_fast.extras import extra
from stn_fast.terminal import printable
from stn_fast.training.config import TUNING

LINES = 12  # approximate number of progress lines without a terminal
SILENCE = 60.0  # seconds without a line after which another one is printed
REDRAW = 0.1  # seconds between two updates of the bar
BAR = "{percentage:3.0f}%|{bar}| epoch {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A bar on a terminal, plain lines elsewhere, only warnings if ``quiet``, nothing at all unless it ``warns``.

    Everything goes to standard error.
    """

    def __init__(self, epochs: int = 0, quiet: bool = False, warns: bool = True) -> None:
        self.epochs, self.quiet, self.warns = epochs, quiet, warns
        self.start = 0.0  # passes over the training set made by an earlier process
        self._bar: Any = None
        self._shown = time.monotonic()

    def say(self, text: str) -> None:
        """Prints one line, unless ``quiet``."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)
            self._shown = time.monotonic()

    def warn(self, text: str) -> None:
        """Prints one line of warning, even if ``quiet``."""
        if self.warns:
            print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def row(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics.jsonl; only evaluations are printed."""
        if self.quiet or row["phase"] != "eval":
            return
        text = f"valid loss {row['loss']:.4f}"
        text += f", accuracy {row['valid_accuracy']:.3f}" if "valid_accuracy" in row else ""
        text += f", perplexity {row['valid_perplexity']:.2f}" if "valid_perplexity" in row else ""
        epoch = row["epoch"]
        if self._bar is not None:
            self._bar.n = epoch
            self._bar.set_postfix_str(text)
        elif epoch % max(1, self.epochs // LINES) == 0 or epoch == self.epochs or self._silent_for(SILENCE):
            self.say(f"epoch {epoch:4d}/{self.epochs}  step {row['step']:6d}  {row['wall_seconds']:6.1f} s  {text}")

    def step(self, passes: float) -> None:
        """Shows the number of passes over the training set, as a fraction."""
        if self._bar is not None and self._silent_for(REDRAW):
            self._bar.n, self._shown = passes, time.monotonic()
            self._bar.refresh()
        elif self._bar is None and self._silent_for(SILENCE):
            self.say(f"epoch {passes:7.2f}/{self.epochs}")

    def _silent_for(self, seconds: float) -> bool:
        return time.monotonic() - self._shown >= seconds

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr is not None and sys.stderr.isatty():
            with extra("tqdm"):
                from tqdm import tqdm
            self._bar = tqdm(total=self.epochs, initial=self.start, bar_format=BAR, file=sys.stderr, dynamic_ncols=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def summary(result: dict[str, Any]) -> str:
    """A table of each hyperparameter at the start, the best step and the end, then the scores of the best step."""
    start, best, end = (result[f"hyperparameters{part}"] for part in ("_start", "", "_end"))
    moved = result["moved_in_initial_scales"]
    width = max(len(printable(name)) for name in ("hyperparameter", *best))
    lines = [f"{'hyperparameter':<{width}}  {'start':>10}  {'best':>10}  {'end':>10}  moved (initial scales)"]
    lines += [
        f"{printable(name):<{width}}"
        + "".join(f"  {_shown(values[name], '.3g'):>10}" for values in (start, best, end))
        + f"  {_shown(moved[name], '+.1f'):>8}"
        for name in best
    ]
    if result["method"] in TUNING and result["valid_steps"] == 0:
        lines.append("no validation step was run: nothing has been tuned yet")
    forms = {"test_loss": ".4f", "test_accuracy": ".4f", "test_perplexity": ".2f"}
    scores = [f"{key.replace('_', ' ')} {_shown(result[key], form)}" for key, form in forms.items() if key in result]
    lines.append(
        f"best validation loss {_shown(result['valid_loss'], '.4f')} at step {result['best_step']} of "
        f"{result['steps']}" + (f"; there, {', '.join(scores)}" if scores else "")
    )
    lines.append(f"{result['steps']} steps at {result['steps_per_second']:.4g} a second, ended by {result['ended_by']}")
    if result["peak_bytes"] is not None:
        lines[-1] += f"; at most {result['peak_bytes'] / 1e6:,.0f} MB of memory"
    if "vocabulary" in result:
        lines.append(
            f"{result['vocabulary']:,} words in the vocabulary; {result['unknown_share']:.1%} of the test text is <unk>"
        )
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    """A number of result.json; None stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)
