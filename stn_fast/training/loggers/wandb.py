"""Weights & Biases: a run whose id is in ``wandb.json`` of the run directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from stn_fast import files
from stn_fast.training.config import Config
from stn_fast.training.loggers import Row, numbers, read_record, scalars
from stn_fast.values import to_json


class WandbLogger:
    """W&B can't take points back, so a resumed run sends only steps that W&B lacks.

    Which these are says the server, or, offline, the record of the last session that was closed. A session offline that
    was killed has lost its latest rows; the next one writes all of its rows again, and sets its folder aside, whose
    name then no longer begins as ``wandb sync --sync-all`` expects.
    """

    def start(self, config: Config, directory: Path, rows: Sequence[Row]) -> None:
        import wandb

        self._record = directory / "wandb.json"
        known = read_record(self._record) or {"run": uuid4().hex[:8], "sent": -1, "open": None}
        if known["open"] is not None:
            folder = directory / "wandb" / known["open"]
            with suppress(FileNotFoundError):  # its user has removed it
                folder.rename(folder.with_name(f"killed-{known['open']}"))
        self._run = wandb.init(
            id=known["run"],
            resume="allow",
            reinit="create_new",  # not to end or use a run of the calling program
            project=os.environ.get("WANDB_PROJECT", "stn_fast"),
            name=directory.name,
            dir=str(directory),
            config=asdict(config),
        )
        self._sent = max(known["sent"], self._run.step - 1)
        self._ended = False
        self._note(known["sent"], Path(self._run.dir).parent.name if self._run.offline else None)
        for row in rows:
            self.row(row)

    def _note(self, sent: int, folder: str | None) -> None:
        files.replace(self._record, to_json({"run": self._run.id, "sent": sent, "open": folder}).encode())

    def row(self, row: Row) -> None:
        step = row["step"]
        if step > self._sent:
            self._run.log(scalars(row), step=step, commit=False)
        if row["phase"] == "eval" and step > self._sent:  # the last row of this step
            self._run.log({}, step=step, commit=True)
            self._sent = step

    def result(self, result: dict[str, Any]) -> None:
        self._run.summary.update(dict(numbers(result, "result")))
        self._ended = True

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._ended else 1)
        self._note(self._sent, None)


make = WandbLogger
