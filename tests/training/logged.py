"""What TensorBoard, W&B and MLflow have of a run: {name: [(step, value), ...]}."""

import json
import struct
from collections import defaultdict
from pathlib import Path

BLOCK, HEADER = 32768, 7  # of LevelDB's log format, in which W&B writes runs


def of_metrics(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What they should have: the numbers in metrics.jsonl."""
    points = defaultdict(list)
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            values = {f"{key}/{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
            for name, one in values.items():
                if name not in ("step", "phase") and isinstance(one, int | float):
                    points[f"{row['phase']}/{name}"].append((row["step"], one))
    return dict(points)


def of_tensorboard(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def of_mlflow(directory: Path, uri: str) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client, run = MlflowClient(uri), json.loads((directory / "mlflow.json").read_text())["run"]
    names = [name for name in client.get_run(run).data.metrics if not name.startswith("result/")]
    return {name: [(one.step, one.value) for one in client.get_metric_history(run, name)] for name in names}


def of_wandb(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What the folders of all sessions that `wandb sync --sync-all` would send have together."""
    from wandb.proto.wandb_internal_pb2 import Record

    points = defaultdict(list)
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(file.read_bytes()):
            row = {
                item.key or "/".join(item.nested_key): item.value_json for item in Record.FromString(data).history.item
            }
            for name in row.keys() - {"_step", "_runtime", "_timestamp"}:
                points[name].append((int(row["_step"]), json.loads(row[name])))
    return dict(points)


def _records(log: bytes):
    """The records of a log, the parts of each (type 1: whole, 2: first, 3: middle, 4: last) joined."""
    place, parts = HEADER, b""  # the file begins with a header, as long as that of a record
    while place + HEADER <= len(log):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        parts += log[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""
