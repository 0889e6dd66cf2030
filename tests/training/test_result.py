"""result.json: JSON that every reader takes, and a damaged one is made again rather than believed."""

import copy
import json
import math

import pytest
from run_files import result, rows

from stn_fast.training.config import Config
from stn_fast.training.layering import build, read_yaml
from stn_fast.training.metrics import MetricsLog
from stn_fast.training.progress import summary
from stn_fast.training.result import is_result
from stn_fast.training.run_directory import RunDirectory


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def damaged(whole):
    """Results that are JSON, each wrong in one way."""
    yield from ([], {}, None, 3, "text", [whole], {"result": whole})
    for key in whole:
        if key in ("peak_bytes", "valid_loss", "test_loss", "valid_accuracy", "test_accuracy", "captured"):
            continue
        yield {**whole, key: None}
    for key in ("recipe", "steps", "test_loss", "hyperparameters", "versions", "moved_in_initial_scales"):
        yield {name: value for name, value in whole.items() if name != key}
        yield {**whole, key: ["x"]}
    for key in ("valid_loss", "test_accuracy", "peak_bytes", "wall_seconds"):
        yield {**whole, key: "0.5"}
        yield {**whole, key: 10**400}
    yield from ({**whole, "captured": value} for value in (3, {}, {"steps": "3", "reasons": []}))
    wrong = copy.deepcopy(whole)
    wrong["hyperparameters_end"].pop("weight_decay")
    yield wrong
    wrong = copy.deepcopy(whole)
    wrong["hyperparameters"]["weight_decay"] = "high"
    yield wrong


def test_an_incomplete_or_damaged_result_is_rejected(train):
    directory = train("schedule.max_steps=2")
    config = build(Config, read_yaml(str(directory / "config.yaml")))
    whole = result(directory, timeless=False)
    assert is_result(whole, config)
    summary(whole)
    for wrong in damaged(whole):
        assert not is_result(wrong, config), wrong


@pytest.mark.parametrize("contents", [b"[]", b"{}", b'{"valid_loss": ', b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_damaged_result_is_made_again_from_the_checkpoint(train, same_run, contents):
    whole = train("schedule.max_steps=20", name="whole")
    again = train("schedule.max_steps=20", name="again")
    (again / "result.json").write_bytes(contents)
    train("schedule.max_steps=20", name="again")
    same_run(whole, again)


def test_scores_that_are_not_finite_are_null_in_every_file_and_are_shown(train, tmp_path):
    directory = train("schedule.max_steps=2")
    whole = result(directory, timeless=False)
    RunDirectory(directory).write_result({**whole, "test_loss": math.nan, "test_perplexity": math.inf})
    text = (directory / "result.json").read_text()
    read = json.loads(text, parse_constant=refuse)
    assert read["test_loss"] is read["test_perplexity"] is None
    assert is_result(read, build(Config, read_yaml(str(directory / "config.yaml"))))
    assert "test loss not finite, test accuracy" in summary(read)
    assert "test perplexity not finite" in summary(read)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write({"valid_perplexity": math.inf, "scales": {"a": math.nan, "b": 1.0}})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"valid_perplexity": None, "scales": {"a": None, "b": 1.0}}
    assert rows(tmp_path) == [line]
