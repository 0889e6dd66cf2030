"""TensorBoard: event files in ``tensorboard/`` of the run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stn_fast.training.config import Config
from stn_fast.training.layering import to_yaml
from stn_fast.training.loggers import Row, scalars
from stn_fast.values import to_json


class TensorBoardLogger:
    """Each process that resumes a run writes all rows again, in a file that replaces those of earlier ones."""

    def start(self, config: Config, directory: Path, rows: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what earlier files have at this step and later ones.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=0)
        self._began = time.time() - (rows[-1]["wall_seconds"] if rows else 0)
        self._text("config", to_yaml(config), 0)
        for row in rows:
            self._write(row)
        self._writer.flush()

    def row(self, row: Row) -> None:
        self._write(row)
        self._writer.flush()

    def _write(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=self._began + row["wall_seconds"])

    def _text(self, name: str, text: str, step: int) -> None:
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # code in Markdown
        self._writer.add_text(name, indented, step)

    def result(self, result: dict[str, Any]) -> None:
        self._text("result", to_json(result, indent=2), result["steps"])

    def close(self) -> None:
        self._writer.close()


make = TensorBoardLogger
