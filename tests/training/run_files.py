"""What a run leaves, without what may differ between two runs of one seed, and what it has warned of."""

import json
from pathlib import Path

from stn_fast.training.metrics import TIMES
from stn_fast.training.progress import Progress


class Warnings(Progress):
    """Keeps the warnings of a run."""

    def __init__(self):
        super().__init__(quiet=True)
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def rows(directory: Path, timeless: bool = True) -> list[dict]:
    """The rows of metrics.jsonl, without their times."""
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not (timeless and key in TIMES)} for row in found]


def result(directory: Path, timeless: bool = True) -> dict:
    """result.json, without its times."""
    found = json.loads((directory / "result.json").read_text())
    return {key: value for key, value in found.items() if not (timeless and key in TIMES)}
