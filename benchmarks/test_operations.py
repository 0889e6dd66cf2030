"""The pytest-benchmark suite: one group per case, one benchmark per provider.

    pytest benchmarks --benchmark-only --benchmark-group-by=group

The providers of a group run one after the other here. Trust the interleaved ratios of `python -m benchmarks.ratios`
where a few per cent matter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, all_cases
from benchmarks.timing import Provider

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    case
    for case in all_cases(DEVICE)
    if case.op != "gated_conv2d_resnet18"  # takes minutes
    if case.mode in ("forward", "full", "valid") or case.op == "gated_conv2d_alexnet"
]
PROVIDERS = {
    "gated_linear": ("stn_fast", "eager", "compiled", "limit_one_product", "limit_two_products"),
    "gated_conv2d": ("stn_fast", "eager", "compiled", "limit_one_convolution"),
    "gated_lstm": ("stn_fast", "eager", "compiled_step", "concatenated", "plain_lstm", "limit_one_product"),
    "perturb": ("stn_fast", "eager", "compiled"),
    "dropout": ("stn_fast", "eager", "compiled", "limit_one_pass"),
    "augment": ("stn_fast", "eager") if DEVICE.type == "cuda" else ("stn_fast", "eager", "pillow"),
}


@lru_cache(maxsize=1)
def providers_of(case: Case) -> dict[str, Provider]:
    return case.providers()


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for op, names in PROVIDERS.items() if case.op.startswith(op) for name in names],
    ids=str,
)
def test_speed(case: Case, name: str, benchmark: Any) -> None:
    provider = providers_of(case)[name]

    def run(state: Any) -> object:
        result = provider.call(state)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = str(case)
    benchmark.pedantic(run, setup=lambda: ((provider.prepare(),), {}), warmup_rounds=2, rounds=10)
