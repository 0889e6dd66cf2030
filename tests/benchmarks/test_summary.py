"""The page of aims and figures says what rows say, and gets by with whatever is in the folder."""

import json
from pathlib import Path

import pytest

from benchmarks import aims, records, summary
from benchmarks.image_cases import GATED_CONV2D_SHAPES
from benchmarks.ratios import write

GPU = "NVIDIA H100 80GB HBM3"
BY_KEY = {aim.key: aim for aim in aims.AIMS}


def row(op, mode, shape, provider="stn_fast", dtype="bfloat16", **figures):
    known = {"p50": 100.0, "captured": True, "host_us": 50.0, "host_bound": False, "device": GPU}
    return {"op": op, "mode": mode, "shape": list(shape), "provider": provider, "dtype": dtype} | known | figures


def figure(key, *rows):
    return BY_KEY[key].figure(aims.Rows(rows))


def lines_of(directory: Path) -> dict[str, list[str]]:
    """The cells of each aim."""
    cells = [line.strip("| ").split(" | ") for line in summary.summary(directory).splitlines() if line.startswith("| ")]
    return {name: [cell.strip(" |") for cell in others] for name, *others in cells}


def test_a_figure_is_met_missed_or_not_measured(tmp_path) -> None:
    write(
        tmp_path / "rows.json",
        [
            row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=1.04),
            row("gated_linear", "train", aims.LSTM_LINEAR, ratio_to_limit=1.3),
            row("gated_lstm", "train", aims.LSTM, ratio_to_plain=1.2, ratio_to_limit=0.7),
        ],
    )
    lines = lines_of(tmp_path)
    assert lines[BY_KEY["linear 4096"].what][1] == "1.04 ×"
    assert lines[BY_KEY["linear 4096"].what][3] == "met"
    assert lines[BY_KEY["linear 650"].what][3] == "missed"
    assert lines[BY_KEY["lstm 650"].what][3] == "met"
    assert lines[BY_KEY["lstm 650 stretch"].what][3] == "missed"
    assert lines[BY_KEY["lstm 1150"].what][1] == "not measured"
    assert "2 met, 2 missed, 10 not measured" in summary.summary(tmp_path)


def test_at_the_bound_an_aim_is_met() -> None:
    most, least = BY_KEY["linear 4096"], BY_KEY["eager 650"]
    assert most.met(aims.Figure(1.05))
    assert not most.met(aims.Figure(1.0501))
    assert least.met(aims.Figure(10))
    assert not least.met(aims.Figure(9.99))


def test_a_mean_over_layers_leaves_none_out() -> None:
    shapes = GATED_CONV2D_SHAPES["alexnet"]
    rows = [row("gated_conv2d_alexnet", "train", shape, ratio_to_limit=2.0**k) for k, shape in enumerate(shapes)]
    assert figure("conv alexnet", *rows).value == pytest.approx(4)
    assert figure("conv alexnet", *rows[1:]) is None


def test_the_eager_loop_takes_what_one_waits_for_and_so_do_we() -> None:
    """As a graph it takes 1 ms of the device, and 60 ms of Python without one."""
    ours = row("gated_lstm", "train", aims.LSTM, p50=800.0, host_us=2000.0)
    eager = row("gated_lstm", "train", aims.LSTM, "eager", p50=1000.0, host_us=60_000.0)
    assert figure("eager 650", ours, eager).value == 30
    assert figure("eager 650", ours) is None


def test_the_last_row_of_a_case_counts_and_those_without_a_number_do_not() -> None:
    rows = [row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=value) for value in (3.0, 2.0, None)]
    assert figure("linear 4096", *rows).value == 2
    other = row("gated_linear", "train", aims.LARGE_LINEAR, dtype="float32", ratio_to_limit=1.0)
    assert figure("linear 4096", other) is None


def test_only_captured_cycles_are_compared_with_captured_plain_steps() -> None:
    shape = aims.CIFAR_BATCH
    eager = row("alexnet_step", "cycle", shape, "stn_fast", ratio_to_plain=1.0)
    assert figure("cycle alexnet", eager) is None
    captured = row("alexnet_step", "cycle", shape, "stn_fast_captured", captured=None, ratio_to_plain=2.1)
    assert figure("cycle alexnet", eager, captured).value == 2.1


def test_figures_that_were_not_timed_as_graphs_say_so() -> None:
    timed = row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=1.0, captured=False, host_bound=True)
    assert figure("linear 4096", timed).note == "not captured: stn_fast; host's time: stn_fast"


def test_a_cpus_rows_are_no_figures_of_a_gpu(tmp_path) -> None:
    write(
        tmp_path / "rows.json",
        [row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=1.0, host_us=None, device="some CPU")],
    )
    page = summary.summary(tmp_path)
    assert "no GPU" in page
    assert "some CPU" not in page
    assert "0 met, 0 missed, 14 not measured" in page


def test_each_gpu_has_a_table_of_its_own(tmp_path) -> None:
    for name, ratio in (("NVIDIA H100", 1.0), ("NVIDIA H200", 9.0)):
        found = row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=ratio, device=name)
        write(tmp_path / name / "rows.json", [found])
    page = summary.summary(tmp_path)
    first, second = page.index("NVIDIA H100"), page.index("NVIDIA H200")
    assert page.count("1 met") == 1
    assert page.count("1 missed") == 1
    assert first < page.index("1 met") < second < page.index("1 missed")


ROWS = [row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=1.0), row("perturb", "full", (1,))]


def whole(tmp_path: Path) -> str:
    write(tmp_path / "whole.json", ROWS)
    text = (tmp_path / "whole.json").read_text()
    (tmp_path / "whole.json").unlink()
    return text


@pytest.mark.parametrize(
    ("damage", "left", "reported"),
    [
        (lambda text: text, ROWS, False),
        (lambda text: text[: text.rindex("]")], ROWS, True),  # killed before the end
        (lambda text: text[: len(text) - 40], ROWS[:1], True),  # in the middle of a row
        (lambda text: text.replace('"op"', '"op', 1), ROWS[1:], True),
        (lambda text: "\0\udcff{[" + text, ROWS, True),
        (lambda text: "", [], True),
        (lambda text: "[" * 100_000, [], True),
        (lambda text: "null", [], False),
        (lambda text: '{"stn": [{"valid_loss": 1}]}', [], False),
        (lambda text: '[1, null, {"op": 3}, {"op": "x"}]', [], False),
    ],
)
def test_what_can_be_read_of_a_damaged_file_is(damage, left, reported, tmp_path) -> None:
    text = damage(whole(tmp_path))
    (tmp_path / "rows.json").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "machine.json").write_text("{")
    rows, problems = records.read_rows(tmp_path)
    assert rows == left
    assert any("rows.json" in problem for problem in problems) == reported
    assert summary.main([str(tmp_path)]) == 0


def test_a_missing_folder_is_a_page_of_nothing_measured(tmp_path, capsys) -> None:
    assert summary.main([str(tmp_path / "missing")]) == 0
    said = capsys.readouterr().out
    assert said.count("not measured") == len(aims.AIMS) + 2
    assert "no such folder" in said


def test_odd_values_in_a_row_are_no_figures(tmp_path) -> None:
    for value in (None, "1.0", float("nan"), float("inf"), -1, 0, True, [1]):
        assert figure("linear 4096", row("gated_linear", "train", aims.LARGE_LINEAR, ratio_to_limit=value)) is None
    odd = row("gated_lstm", "train", aims.LSTM, p50=800.0, host_us="x")
    assert figure("eager 650", odd, odd | {"provider": "eager"}).value == 1


def test_the_recorded_results_give_a_page(capsys) -> None:
    assert summary.main([str(Path(aims.__file__).parent / "results")]) == 0
    assert "| what | aim |" in capsys.readouterr().out


def test_rows_that_are_written_can_be_read_again(tmp_path) -> None:
    write(tmp_path / "rows.json", ROWS)
    assert records.read_rows(tmp_path) == (ROWS, [])
    assert json.loads((tmp_path / "rows.json").read_text()) == ROWS
