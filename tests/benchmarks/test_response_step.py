"""Everyone who takes part in `benchmarks.response_step` computes the same gradients, and the command writes rows."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import plain, response_step
from benchmarks.response_step import EagerMLP, by_double_backward, by_jvp, by_two_vjps, hold_weights, sampled
from stn_fast.models import plain_mlp, tuned
from stn_fast.training.linearised import Linearised
from stn_fast.training.task import outputs


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in dict(SIZES=(6, 9, 7, 4), BATCH=5, WINDOW=3, COLUMNS=2, WIDTH=8, WORDS=11).items():
        monkeypatch.setattr(response_step, name, value)


def test_all_ways_give_the_same_response_gradients(monkeypatch):
    space = response_step.space_of("one", "two")
    monkeypatch.setattr(plain, "RATE", 0.0)
    torch.manual_seed(0)
    ours, eager = tuned(plain_mlp(response_step.SIZES), space).double(), EagerMLP(2).double()
    layers = [f"linear_{number}" for number in (1, 2, 3)]
    for mine, theirs in zip(map(ours.get_submodule, layers), eager.layers, strict=True):
        pairs = {
            theirs.general.weight: mine.weight, theirs.general.bias: mine.bias,
            theirs.response.weight: mine.response_weight, theirs.response_bias: mine.response_bias,
            theirs.weight_gate.weight: mine.weight_gate, theirs.bias_gate.weight: mine.bias_gate,
        }  # fmt: skip
        with torch.no_grad():
            for copy, original in pairs.items():
                copy.copy_(original)
    hold_weights(ours)
    x, targets, hyper = torch.randn(5, 6).double(), torch.randint(4, (5,)), sampled(space, 5, torch.device("cpu"))
    theirs = by_double_backward(eager, x, targets, hyper.response.double())
    # EagerGated has R before r, and W and b ask for no gradient.
    order = [f"{layer}.{name}" for layer in layers for name in ORDER]
    for tangent in (None, by_jvp, by_two_vjps):
        if tangent is None:
            logits = outputs(Linearised(ours), hyper, x)
        else:
            logits = tangent(lambda h: outputs(ours, replace(hyper, response=h), x), hyper.response.double())
        found = torch.autograd.grad(F.cross_entropy(logits, targets), [ours.get_parameter(name) for name in order])
        for name, one, other in zip(order, found, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=name)


ORDER = ("response_bias", "response_weight", "weight_gate", "bias_gate")


def test_the_command_writes_a_row_for_everyone(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert response_step.main(["--seconds", "0.01", "--rounds", "2", "--json", str(file)]) == 0
    rows = {(row["mode"], *row["shape"][:1], row["provider"]): row for row in json.loads(file.read_text())}
    for size in (5, 3):
        for mode in response_step.MODES:
            without = {"response": {"plain"}, "iteration": {"double_backward", "func_jvp"}}[mode]
            for provider in set(response_step.PROVIDERS) - without:
                row = rows[mode, size, provider]
                key = "ratio_to_plain" if mode == "iteration" else "ratio_to_double_backward"
                assert row[key] > 0
    assert "ratio to double_backward" in capsys.readouterr().out
