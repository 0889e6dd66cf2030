"""The measuring itself: turns, ratios, memory, and rows that lack nothing."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from benchmarks import image_cases, ratios
from benchmarks.cases import GATED_LINEAR_MODES, Case, all_cases
from benchmarks.timing import Provider, Timings, interleave, peak_bytes

CPU = torch.device("cpu")
KEYS = {
    "op", "mode", "shape", "dtype", "provider", "p20", "p50", "p80", "captured", "host_us", "host_bound",
    "ratio_to_limit", "ratio_to_eager", "ratio_to_plain", "peak_bytes", "launches", "device", "versions",
}  # fmt: skip


def test_providers_take_turns_and_none_is_always_first() -> None:
    turns: list[str] = []
    providers = {name: Provider(lambda _: None) for name in "ABC"}
    timings = interleave(providers, CPU, seconds=0, min_rounds=4, trace=turns.append)
    assert "".join(turns) == "ABCBCACABABC"
    assert timings.microseconds.shape == (4, 3)


def test_warm_up_and_preparation_are_not_timed() -> None:
    calls = []

    def slow_at_first(_: object) -> None:
        calls.append(None)
        if len(calls) <= 2:
            time.sleep(0.2)

    provider = Provider(slow_at_first, prepare=lambda: time.sleep(0.02))
    timings = interleave({"A": provider}, CPU, seconds=0, min_rounds=3, warmup=2)
    assert timings.of("A").max() < 15e3


def test_a_ratio_is_taken_within_rounds_so_a_slow_machine_does_not_change_it() -> None:
    """A machine that becomes ten times slower half way hits both alike: the ratio of medians would be off."""
    slowness = np.array([1.0, 1.0, 10.0, 1.0, 10.0])
    timings = Timings(("A", "B"), np.stack([2 * slowness, 1 * slowness], axis=1))
    assert timings.ratio("A", "B") == 2
    assert timings.percentile("A", 50) == 2


def test_the_limit_is_the_faster_of_the_two() -> None:
    timings = Timings(("limit_one", "stn_fast", "limit_two"), np.array([[3.0, 1.0, 2.0]] * 3))
    assert ratios.limit_of(timings) == "limit_two"
    assert ratios.limit_of(Timings(("eager",), np.ones((3, 1)))) is None


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    x = torch.ones(1000, 256)
    one = x.nbytes

    def three_then_one(_: object) -> torch.Tensor:
        first, second = x + 1, x + 2
        third = first * second
        del first, second
        return third.clone()

    assert peak_bytes(Provider(three_then_one), CPU) == 3 * one
    assert peak_bytes(Provider(lambda _: x.add_(0)), CPU) < one / 100


def test_every_case_has_an_eager_provider_and_the_package() -> None:
    for case in all_cases(CPU, quick=True):
        names = case.providers()
        assert {"stn_fast", "eager"} <= set(names), case
        if case.op == "gated_linear":
            assert {"limit_one_product", "limit_two_products"} <= set(names)


@pytest.mark.parametrize("mode", GATED_LINEAR_MODES)
def test_all_implementations_of_a_mode_return_the_same_tensors(mode: str) -> None:
    case = Case("gated_linear", mode, (8, 6, 4), torch.float32, CPU, compiled=False)
    providers = case.providers()
    got, want = (providers[name].call(providers[name].prepare()) for name in ("stn_fast", "eager"))
    if mode == "forward":
        got, want = (got,), (want,)
    assert len(got) == len(want) == max(1, sum(GATED_LINEAR_MODES[mode][1]))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_compiled_baselines_return_what_eager_returns() -> None:
    case = Case("gated_linear", "full", (8, 6, 4), torch.float32, CPU)
    providers = case.providers()
    want = providers["eager"].call(None)
    for name in ("compiled", "concatenated"):
        for one, other in zip(providers[name].call(None), want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_quick_run_writes_complete_rows_and_prints_a_table(tmp_path: Path, capsys) -> None:
    file = tmp_path / "new" / "rows.json"
    assert ratios.main(["--device", "cpu", "--quick", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["op"] for row in rows} == {
        "gated_linear", "gated_conv2d_alexnet", "gated_conv2d_resnet18", "gated_lstm", "perturb", "augment",
        "dropout_flat", "dropout_channel", "dropout_locked",
    }  # fmt: skip
    for row in rows:
        assert set(row) == KEYS
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["ratio_to_eager"] > 0
        assert row["peak_bytes"] >= 0
        assert {"python", "torch", "triton", "stn_fast"} <= set(row["versions"])
        assert (row["ratio_to_limit"] is None) == (row["op"] in ("perturb", "augment"))
        assert (row["ratio_to_plain"] is None) == (row["op"] != "gated_lstm")
        assert row["captured"] is row["host_us"] is row["launches"] is None  # of a GPU alone
    printed = capsys.readouterr().out
    assert "p50 µs" in printed
    assert "valid / full backward" in printed


def test_without_pillow_only_what_needs_it_fails(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(image_cases, "augmentation", fresh_import("benchmarks.augmentation", monkeypatch))
    assert ratios.main(["--quick", "--ops", "augment"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"pillow +failed: ModuleNotFoundError: .*PIL", printed)
    assert re.search(r"stn_fast +\d", printed)
    assert re.search(r"eager +\d", printed)


def fresh_import(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module, imported anew; the one that was there is put back after the test."""
    package, _, child = name.rpartition(".")
    before = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.import_module(package), child, before)
    return importlib.import_module(name)


def test_a_run_that_is_killed_leaves_whole_rows(tmp_path: Path) -> None:
    """Killed while a long file is written again and again: what is there can be read, and has all of its rows."""
    file = tmp_path / "rows.json"
    code = (
        "import pathlib, sys; from benchmarks.ratios import write\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "rows = [{'op': 'x' * 1000, 'p50': k} for k in range(5000)]\n"
        "while True: write(file, rows)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(20):
            assert len(json.loads(file.read_text())) == 5000
    finally:
        process.kill()
        process.wait()
    assert len(json.loads(file.read_text())) == 5000


def test_an_unknown_operation_is_refused(capsys) -> None:
    assert ratios.main(["--quick", "--ops", "convolution"]) == 2
    assert "convolution" in capsys.readouterr().err
    assert ratios.main(["--quick", "--ops", "perturb", "--dtypes", "bfloat16"]) == 2
    assert "bfloat16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_cuda_is_refused_in_one_line_where_there_is_none() -> None:
    command = [sys.executable, "-m", "benchmarks.ratios", "--device", "cuda"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in result.stderr


def test_a_row_is_json_whatever_was_measured_and_is_written_below_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ratios.write(Path("~/rows.json"), [{"p50": float("inf"), "ratio_to_limit": float("nan"), "op": "x"}])
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"p50": None, "ratio_to_limit": None, "op": "x"}]
