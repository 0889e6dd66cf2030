"""What is recorded of a step without a GPU, in a process of its own: here Triton interprets."""

import json
import os
import subprocess
import sys

import pytest
from compile_ahead import Usage, compile_all
from launched_kernels import ROOT, jobs

from benchmarks.launches import RECIPES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a recipe of each kind, by recipe and step."""
    file = tmp_path_factory.mktemp("launches") / "rows.json"
    command = [sys.executable, "-m", "benchmarks.launches", "digits", "ptb-small", "--seconds", "0", "--operators"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([*command, "--json", file], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {(row["recipe"], row["step"]): row for row in json.loads(file.read_text())}


@pytest.fixture(scope="module")
def recorded():
    """The rows that are kept in the repository, of all recipes."""
    return json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text())


def test_the_recorded_counts_are_those_of_today(rows, recorded):
    kept = {(row["recipe"], row["step"]): row for row in recorded}
    assert {key: kept[key] for key in rows} == rows


def test_the_readme_shows_the_recorded_counts(recorded):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    lines = text[text.index("| recipe, step |") :].split("\n\n")[0].splitlines()[2:]
    counts = ("triton", "other", "reads")
    assert lines == [
        f"| {row['recipe']}, {row['step']} | {' | '.join(str(row[count]) for count in counts)} |" for row in recorded
    ]
    assert {row["recipe"] for row in recorded} == set(RECIPES)


def test_a_step_never_waits_for_the_device(rows):
    assert {key: row["reads"] for key, row in rows.items()} == dict.fromkeys(rows, 0)


def test_every_gated_layer_is_computed_by_kernels(rows):
    train, valid = rows["digits", "train"]["kernels"], rows["digits", "valid"]["kernels"]
    assert train["gated_linear_epilogue_fwd_kernel"] == valid["gated_linear_epilogue_fwd_kernel"] == 3
    assert train["gated_linear_epilogue_bwd_gates_kernel"] == valid["gated_linear_epilogue_bwd_rows_kernel"] == 3
    assert train["dropout_kernel"] == 5  # three places; backward redraws two, and the input needs no gradient
    assert train["perturb_fwd_kernel"] == valid["perturb_bwd_kernel"] == 1


def test_a_validation_step_at_shared_hyperparameters_is_torch_s_own_lstm(rows):
    assert rows["ptb-small", "valid"]["operators"]["lstm"] == 2
    assert rows["ptb-small", "train"]["operators"].get("lstm") is None


def test_recorded_variants_compile_for_a_real_device():
    found = jobs(["digits"], [90])
    precisions = {job.constants["PRECISION"] for job in found if "PRECISION" in job.constants}
    assert precisions == {"ieee", "tf32"}
    modules = ("perturb", "noise", "dropout")  # small ones; `make launched-kernels` compiles all of all recipes
    of_kernel = {job.kernel: job for job in found if job.kernel.split(":")[0].endswith(modules)}
    assert len(of_kernel) == 4
    for job, usage in zip(of_kernel.values(), compile_all(of_kernel.values()), strict=True):
        assert isinstance(usage, Usage), f"{job}: {usage}"
