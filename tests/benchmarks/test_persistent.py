"""The benchmark provider that asks for the persistent recurrence."""

import torch

from benchmarks.persistent import persistent
from benchmarks.timing import Provider
from stn_fast.kernels import gated_lstm_persistent as kernels

CUDA = torch.device("cuda", 0)


def test_both_halves_of_a_provider_ask_for_it(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda *_: None)
    asked = []
    provider = Provider(lambda state: asked.append((state, kernels._asked_for)), lambda: kernels._asked_for)
    (asking,) = persistent(provider, 40, 650, torch.bfloat16, CUDA).values()
    asking.call(asking.prepare())
    provider.call(provider.prepare())
    assert asked == [(True, True), (False, False)]


def test_it_is_left_out_where_it_cannot_run(monkeypatch):
    provider = Provider(lambda _: None)
    assert persistent(provider, 40, 650, torch.bfloat16, torch.device("cpu")) == {}
    monkeypatch.setattr(kernels, "_import_failure", lambda: "ImportError: no cuda.core")
    assert persistent(provider, 40, 650, torch.bfloat16, CUDA) == {}
