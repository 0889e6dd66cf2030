"""A run directory: its files, and checks of whether it can be written and whether a run may continue in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from stn_fast import files
from stn_fast.data.fingerprint import PARTS
from stn_fast.errors import UserError
from stn_fast.files import exists, make_directory, read_bytes
from stn_fast.training import checkpoint
from stn_fast.training.config import Config
from stn_fast.training.disk import writing
from stn_fast.training.layering import build, differences, read_yaml, to_yaml
from stn_fast.training.result import is_result
from stn_fast.values import from_json, to_json

MOST_DIFFERENCES = 5  # at most so many are listed in an error


class RunDirectory:
    """The files of one run; with ``write``, the directory is made if missing.

    Raises:
        UserError: the directory cannot be created or written, and ``write`` is True.
    """

    def __init__(self, path: str | Path, *, write: bool = True) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.schedule = self.path / "schedule.png"
        self.checkpoints = self.path / "checkpoints"
        self.logger_records = (self.path / "wandb.json", self.path / "mlflow.json")
        self._made = write and not exists(self.path)
        if write:
            self._make_writable()

    def _make_writable(self) -> None:
        probe = self.path / ".writable"
        try:
            make_directory(self.path)
            probe.touch()
            probe.unlink(missing_ok=True)
        except FileExistsError:
            raise UserError(f"--run-dir {self.path} is a file; name a directory") from None
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path} cannot be written ({error.strerror}); name a directory that can"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other run can use the directory (unless the system or the file system has no locks).

        Raises:
            UserError: another run is using it.
        """
        lock = self.path / ".lock"
        with ExitStack() as stack:
            try:
                with writing(lock):
                    stack.enter_context(files.locked(lock, wait=False))
            except files.Locked:
                raise UserError(
                    f"another run is using {self.path}; wait for it to end, or choose another --run-dir"
                ) from None
            try:
                yield
            finally:
                self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        """If no run has begun, removes a directory that was created for it and holds only its lock."""
        with suppress(OSError):
            if self._made and [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def check_free(self) -> None:
        """Raises UserError if there are files that no run has written, which ``clear`` or a new run would affect."""
        foreign = checkpoint.foreign(self.checkpoints)
        taken = [file for file in self._files if exists(file)]
        if taken and not self._holds_a_run:
            foreign += taken
        if foreign:
            raise UserError(
                f"{foreign[0]} was not written by a run that can be continued: choose another --run-dir, "
                "move the file away, or overwrite it with --no-resume"
            )

    def clear(self) -> None:
        """Removes the files of an earlier run; files with other names stay."""
        checkpoint.clear(self.checkpoints)
        with writing(self.path):
            for file in self._files:
                file.unlink(missing_ok=True)

    def clear_result(self) -> None:
        """Removes the files that a run writes at its end."""
        with writing(self.path):
            self.result.unlink(missing_ok=True)
            self.schedule.unlink(missing_ok=True)

    @property
    def _files(self) -> tuple[Path, ...]:
        return self.metrics, self.result, self.schedule, self.config, self.data, *self.logger_records

    @property
    def _holds_a_run(self) -> bool:
        try:
            self.saved_config()
        except UserError:
            return False
        return True

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return bool(checkpoint.steps(self.checkpoints))

    def check_finished(self, config: Config) -> None:
        """Raises UserError if the run, which has a result but no checkpoint, is not the finished one of ``config``."""
        self.check_same_run(config)
        if self.finished_result(config) is None:
            raise UserError(
                f"{self.path} holds a finished run, but none of its checkpoints: restore {self.checkpoints} from a "
                "copy, choose another --run-dir, or start over with --no-resume"
            )

    def check_same_run(self, config: Config) -> None:
        """Raises UserError if ``config`` would give different numbers than the run in this directory."""
        if not exists(self.config):
            raise UserError(f"{self.path} has no config.yaml; restore it, or start over with --no-resume")
        cure = "choose another --run-dir, or start over with --no-resume"
        saved = self.saved_config()
        if saved.recipe != config.recipe:
            raise UserError(f"{self.path} holds a run of the recipe '{saved.recipe}', not '{config.recipe}': {cure}")
        changed = differences(saved, config)
        if changed:
            more = len(changed) - MOST_DIFFERENCES
            named = "; ".join(changed[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise UserError(f"{self.path} holds a run with other settings ({named}): {cure}")

    def check_same_data(self, data: dict[str, str], warn: Callable[[str], None]) -> None:
        """Raises UserError if the run in this directory was trained on other data; arguments as of ``changed_data``."""
        if changed := self.changed_data(data, warn):
            raise UserError(
                f"{self.path} holds a run on other data (different: {', '.join(changed)}): "
                "choose another --run-dir, name the run's data with --data-root, or start over with --no-resume"
            )

    def changed_data(self, data: dict[str, str], warn: Callable[[str], None]) -> list[str]:
        """The parts of the data whose fingerprint in ``data`` is not that of the run in this directory.

        ``warn`` is called if this cannot be checked, because the run is from before fingerprints were saved.
        """
        if not exists(self.data):
            warn(f"{self.path} has no data.json: cannot check whether it was trained on these data")
            return []
        saved = self._saved_data()
        return [name for part, name in PARTS.items() if saved.get(part) != data.get(part)]

    def _saved_data(self) -> dict[str, str]:
        try:
            saved = from_json(read_bytes(self.data))
        except (UserError, ValueError):
            saved = None
        if not isinstance(saved, dict):
            raise UserError(
                f"{self.data} is not a fingerprint of a run's data: restore it, or start over with --no-resume"
            )
        return saved

    def saved_config(self) -> Config:
        """The configuration of the run in this directory."""
        try:
            return build(Config, read_yaml(str(self.config)))
        except UserError as error:
            raise UserError(
                f"{self.config} is not a run's configuration ({error}): restore it, or start over with --no-resume"
            ) from None

    def finished_result(self, config: Config) -> dict[str, Any] | None:
        """The result of the run in this directory, if it is undamaged and the run was as long as ``config`` asks."""
        if not exists(self.result):
            return None
        saved = self.saved_config()
        if (saved.schedule, saved.optimizer) != (config.schedule, config.optimizer):
            return None
        contents = read_bytes(self.result)
        try:
            result = from_json(contents)
        except ValueError:
            return None
        return result if is_result(result, config) else None

    def write_config(self, config: Config) -> None:
        """Saves the resolved configuration."""
        self._write(self.config, to_yaml(config))

    def write_data(self, data: dict[str, str]) -> None:
        """Saves the fingerprint of the data."""
        self._write(self.data, to_json(data, indent=2) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Saves ``result.json``."""
        self._write(self.result, to_json(result, indent=2) + "\n")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with writing(path):
            files.replace(path, text.encode())
