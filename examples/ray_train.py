"""Ray Train: two workers of a local Ray share each batch of a recipe. If one dies, Ray starts both again.

    python examples/ray_train.py

New workers continue from the newest checkpoint, bit for bit. On a cluster, leave out `ray.init`, and put the run
directory on a disk that all nodes share. `pip install '.[ray]'` installs Ray.
"""

import argparse
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

from stn_fast.recipes.digits import build
from stn_fast.recipes.digits import config as digits
from stn_fast.training.distributed import Processes
from stn_fast.training.layering import resolve
from stn_fast.training.progress import Progress
from stn_fast.training.run import run


class Report(Progress):
    """Reports evaluations to Ray, which waits for the reports of all workers."""

    def row(self, row: dict[str, Any]) -> None:
        if row["phase"] == "eval":
            keys = ("step", "epoch", "loss", "valid_accuracy")
            train.report({key: row[key] for key in keys} | row["hyperparameters"])


def work(settings: dict[str, Any]) -> None:
    config = resolve(digits(), flags=settings)
    processes = Processes(torch.distributed.group.WORLD)  # type: ignore[arg-type]
    result = run(config, build, progress=Report(quiet=True), processes=processes)
    scores = {key: result[key] for key in ("best_step", "valid_loss", "test_accuracy")} | result["hyperparameters"]
    directory = train.Checkpoint.from_directory(config.directory)  # Ray copies it to its own storage
    train.report(scores, checkpoint=directory if processes.rank == 0 else None)


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--epochs", type=int, default=50)
    it.add_argument("--folder", type=Path, default=Path("runs/ray"))
    flags = it.parse_args(arguments)
    folder = flags.folder.resolve()  # workers have another working directory
    settings = {"schedule.epochs": flags.epochs, "run_dir": str(folder / "run"), "threads": 1}
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    kept = train.RunConfig(storage_path=str(folder / "ray"), failure_config=train.FailureConfig(max_failures=2))
    # On GPUs: use_gpu=True, "cpu:gloo,cuda:nccl" in place of "gloo", and "device": "cuda" in the settings.
    how = dict(torch_config=TorchConfig("gloo"), scaling_config=train.ScalingConfig(num_workers=2), run_config=kept)
    print(TorchTrainer(work, train_loop_config=settings, **how).fit().metrics)


if __name__ == "__main__":
    main()
