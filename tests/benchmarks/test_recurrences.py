"""The benchmark providers that ask for one way to compute the recurrence."""

import torch

from benchmarks.recurrences import ways
from benchmarks.timing import Provider
from stn_fast.kernels import gated_lstm, gated_lstm_persistent

CUDA = torch.device("cuda", 0)


def test_both_halves_of_a_provider_ask_for_its_way(monkeypatch):
    monkeypatch.setattr(gated_lstm_persistent, "why_not", lambda *_: None)
    asked = []
    provider = Provider(lambda state: asked.append((state, gated_lstm._asked_for)), lambda: gated_lstm._asked_for)
    asking = ways(provider, 40, 650, torch.bfloat16, CUDA)
    assert list(asking) == ["steps", "persistent"]
    for each in (*asking.values(), provider):
        each.call(each.prepare())
    assert asked == [("steps", "steps"), ("persistent", "persistent"), (None, None)]


def test_what_cannot_run_is_left_out(monkeypatch):
    provider = Provider(lambda _: None)
    assert ways(provider, 40, 650, torch.bfloat16, torch.device("cpu")) == {}
    monkeypatch.setattr(gated_lstm_persistent, "unavailable", lambda: "ImportError: no cuda.bindings")
    assert list(ways(provider, 40, 650, torch.bfloat16, CUDA)) == ["steps"]
