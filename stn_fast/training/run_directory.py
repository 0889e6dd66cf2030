"""A run directory: what is in it, whether it can be written, and whether a run may go on in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stn_fast.errors import UserError
from stn_fast.training import checkpoint
from stn_fast.training.config import Config
from stn_fast.training.layering import build, differences, read_yaml, to_yaml


class RunDirectory:
    """The files of one run.

    Raises:
        UserError: the directory cannot be made or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.schedule = self.path / "schedule.png"
        self.checkpoints = self.path / "checkpoints"
        probe = self.path / ".writable"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except FileExistsError:
            raise UserError(f"--run-dir {path} is a file; name a directory") from None
        except OSError as error:
            raise UserError(
                f"--run-dir {path} cannot be written ({error.strerror}); name a directory that can"
            ) from None

    def clear(self) -> None:
        """Removes what an earlier run left; files of other names stay."""
        for file in (self.config, self.metrics, self.result, self.schedule):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(checkpoint.steps(self.checkpoints))

    def check_same_run(self, config: Config) -> None:
        """Raises UserError where ``config`` would give other numbers than the run that is here."""
        if not self.config.exists():
            raise UserError(f"{self.path} has no config.yaml; restore it, or start over with --no-resume")
        changed = differences(self.saved_config(), config)
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({'; '.join(changed)}): "
                "choose another --run-dir, or start over with --no-resume"
            )

    def saved_config(self) -> Config:
        """The configuration of the run that is here."""
        return build(Config, read_yaml(str(self.config)))

    def finished_result(self, config: Config) -> dict[str, Any] | None:
        """The result of the run that is here, if it went exactly as far as ``config`` asks."""
        if not self.result.exists() or self.saved_config().schedule != config.schedule:
            return None
        try:
            return json.loads(self.result.read_text())
        except ValueError:
            return None

    def write_config(self, config: Config) -> None:
        """Saves the resolved configuration."""
        _replace(self.config, to_yaml(config))

    def write_result(self, result: dict[str, Any]) -> None:
        """Saves ``result.json``."""
        _replace(self.result, json.dumps(result, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
