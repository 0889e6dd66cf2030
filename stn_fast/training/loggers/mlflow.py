"""MLflow: a run whose id is in ``mlflow.json`` of the run directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stn_fast import files
from stn_fast.training.config import Config
from stn_fast.training.layering import flatten
from stn_fast.training.loggers import Row, numbers, read_record, scalars
from stn_fast.values import to_json

MOST_METRICS, MOST_PARAMETERS, LONGEST = 1000, 100, 500  # in a request; characters of a parameter


class MlflowLogger:
    """MLflow can't take points back, so a resumed run sends only rows that the run of MLflow lacks."""

    def start(self, config: Config, directory: Path, rows: Sequence[Row]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, record, self._ended = MlflowClient(), directory / "mlflow.json", False
        known = read_record(record)
        if known:
            self._id = known["run"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "stn_fast")
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            self._id = self._client.create_run(experiment, run_name=directory.name).info.run_id
            settings = flatten(asdict(config)).items()
            given = [Param(_key(key), str(value)[:LONGEST]) for key, value in settings]
            for first in range(0, len(given), MOST_PARAMETERS):
                self._client.log_batch(self._id, params=given[first : first + MOST_PARAMETERS])
            files.replace(record, to_json({"run": self._id}).encode())
        phases = ("train", "valid", "eval")
        histories = {phase: self._client.get_metric_history(self._id, f"{phase}/loss") for phase in phases}
        self._sent = {(phase, point.step) for phase, points in histories.items() for point in points}
        for row in rows:
            self.row(row)

    def row(self, row: Row) -> None:
        if (row["phase"], row["step"]) not in self._sent:
            self._send(scalars(row), row["step"])

    def _send(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_key(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + MOST_METRICS])

    def result(self, result: dict[str, Any]) -> None:
        self._send(dict(numbers(result, "result")), result["steps"])
        self._ended = True

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED" if self._ended else "KILLED")


def _key(name: str) -> str:
    """``name`` with characters that MLflow refuses replaced."""
    return re.sub(r"[^\w/.\- ]", "_", name)


make = MlflowLogger
