"""The command that measures what a step costs when two processes share its batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import MODEL, predicted
from stn_fast.models import mlp
from stn_fast.recipes import recipe
from stn_fast.training.spaces import build_space

ROOT = Path(__file__).parents[2]
LINK = {"latency_seconds": 1e-3, "bytes_per_second": 1e6}


def test_the_command_counts_bytes_and_compares_the_ways_to_average(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.processes", "--recipes", "digits", "--steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--repetitions", "1", "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    link, row = json.loads(out.read_text())
    assert min(link["latency_seconds"], link["bytes_per_second"]) > 0
    assert link["processes"] == row["processes"] == 2

    space = build_space(recipe("digits").config())
    parameters = [one.numel() for one in mlp(space).parameters()]
    assert row["parameters"] == sum(parameters)
    # All gradients, the loss and the number of examples in float32; and the moments of the response in float64.
    assert row["train_bytes"] == 4 * (sum(parameters) + len(parameters) + 2) + 8 * (len(space) ** 2 + 1)
    assert row["train_reductions"] == 2
    # The loss, the gradients of λ and ρ, and the number of examples, in float64.
    assert row["valid_bytes"] == 8 * (2 * len(space) + 2)
    assert row["valid_reductions"] == 1
    # For λ, ρ and each parameter, the largest and the smallest.
    assert row["check_bytes"] == 2 * 8 * (2 * len(space) + len(parameters))
    assert row["train_two_to_one"] == pytest.approx(row["train_seconds_two"] / row["train_seconds_one"])
    assert row["ddp_to_flat"] == pytest.approx(row["ddp_seconds"] / row["flat_seconds"])
    assert "ddp to flat" in done.stdout


LINK_HERE, *ROWS = json.loads((ROOT / "benchmarks" / "results" / "processes-cpu.json").read_text())
PAGE = (ROOT / "docs" / "runs.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"])
def test_the_page_shows_what_was_recorded(row):
    name = f"`{row['recipe']}`"
    tables = [[name, f"{row['parameters']:,}", f"{row['train_bytes']:,}", f"{row['valid_bytes']:,}"]]
    for kind, of_kind in (("train", "training"), ("valid", "validation")):
        times = [f"{1e3 * row[f'{kind}_seconds_{count}']:.1f}" for count in ("one", "two")]
        ratios = [f"{row[f'{kind}_{key}']:.2f}" for key in ("two_to_one", "cpu_two_to_one")]
        tables.append([f"{name}, {of_kind}", *times, *ratios])
    ways = [f"{1e3 * row[f'{way}_seconds']:.1f}" for way in ("local", "flat", "ddp")]
    ratios = [f"{row[key]:.2f}" for key in ("ddp_to_flat", "ddp_to_flat_cpu")]
    tables.append([name, *ways, *ratios, f"{1e3 * row['check_seconds']:.1f}"])
    model = [predicted(row, "train", count, LINK_HERE) / row["train_seconds_one"] for count in MODEL]
    tables.append([name, *(f"{value:.2f}" for value in model)])
    lines = PAGE.splitlines()
    for cells in tables:
        assert f"| {' | '.join(cells)} |" in lines
    assert row["ddp_to_flat"] > 0.95, "the page says that DistributedDataParallel is not faster"


def test_the_page_names_latency_bandwidth_and_load():
    page = " ".join(PAGE.split())
    latency, bandwidth = 1e6 * LINK_HERE["latency_seconds"], LINK_HERE["bytes_per_second"] / 1e9
    assert f"a latency of {latency:.0f} µs and a bandwidth of {bandwidth:.2f} GB/s" in page
    assert f"with a load of {LINK_HERE['load']:.0f}," in page


@pytest.mark.parametrize(("processes", "seconds"), [(1, 8.0), (2, 4 + 0.003 + 1), (4, 2 + 0.003 + 1.5)])
def test_the_model_adds_computation_latency_and_bytes(processes, seconds):
    row = {"train_seconds_one": 8.0, "train_reductions": 3, "train_bytes": 1_000_000}
    expected = 8.0 if processes == 1 else seconds
    assert predicted(row, "train", processes, LINK) == pytest.approx(expected)
