"""Operations where OpenMP starts fewer threads than torch counts on, by its environment variables and at run time.

oneDNN's products then leave part of their result unwritten. Fresh memory is filled with NaN, so that this shows.
"""

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import stn_fast
from stn_fast.ops import openmp, products

_C = pytest.importorskip("stn_fast._C")

pytestmark = pytest.mark.skipif(not _C.openmp(), reason="the core runs on one thread")

CHILD = """
import ctypes, json, sys
import torch
import stn_fast as stn
from stn_fast import functional as SF

at_run_time = sys.argv[1] == "at run time"
torch.set_num_threads(2)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
torch.manual_seed(0)
n = 3
layers = {
    "linear": (stn.HyperLinear(300, 400, num_hyperparameters=n), (64, 300)),
    "linear of few rows": (stn.HyperLinear(1024, 1024, num_hyperparameters=n), (3, 1024)),
    "conv2d": (stn.HyperConv2d(8, 16, 3, num_hyperparameters=n), (16, 8, 20, 20)),
    "conv2d 1x1": (stn.HyperConv2d(32, 64, 1, num_hyperparameters=n), (16, 32, 9, 9)),
    "lstm": (stn.HyperLSTM(64, 64, num_hyperparameters=n), (3, 64, 64)),
    "lstm of packed weights": (stn.HyperLSTM(16, 384, num_hyperparameters=n), (2, 16, 16)),
}
for layer, _ in layers.values():
    for name, parameter in layer.named_parameters():
        if name.startswith("response"):  # which starts at 0
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
examples = {"linear": 64, "linear of few rows": 3, "lstm": 64}

def run(layer, x, h):
    leaves = [x.clone().requires_grad_(), h.clone().requires_grad_(), *layer.parameters()]
    y = layer(leaves[0], leaves[1])
    y = y[0] if isinstance(y, tuple) else y
    return [y.detach(), *torch.autograd.grad((y * y.detach().cos()).sum(), leaves)]

worst = {}
for shared in (False, True):
    for name, (layer, shape) in layers.items():
        x = torch.randn(shape)
        h = torch.randn(n) if shared else torch.randn(examples.get(name, 16), n)
        if at_run_time:
            run(layer, x, h)  # with all threads, so that what is remembered is of them
            ctypes.CDLL("libgomp.so.1").omp_set_max_active_levels(0)
        got = run(layer, x, h)
        if at_run_time:
            ctypes.CDLL("libgomp.so.1").omp_set_max_active_levels(8)
        with stn.use_backend("reference"):
            want = run(layer.double(), x.double(), h.double())
        layer.float()
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want)]
        worst[f"{name}, {'shared' if shared else 'rows'}"] = max(e if e == e else 9.0 for e in errors)
print(json.dumps(worst))
"""

SETTINGS = ({}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_MAX_ACTIVE_LEVELS": "0"}, {"OMP_DYNAMIC": "true"}, "at run time")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_results_and_gradients_are_whole_whatever_threads_openmp_gives(setting):
    named = {} if isinstance(setting, str) else setting
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    environment |= {"OMP_WAIT_POLICY": "passive"} | named
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(setting)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    worst = json.loads(done.stdout)
    assert worst
    assert {name: error for name, error in worst.items() if not error < 1e-4} == {}


def test_without_a_full_team_torch_computes_and_backends_says_so(monkeypatch):
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "full_team", lambda: True)
    assert products.library() == products.description() == "oneDNN"
    monkeypatch.setattr(products, "full_team", lambda: False)
    assert products.library() == "torch.mm"
    assert "fewer threads" in str(stn_fast.backends()["cpp"])


def test_a_team_that_openmp_cannot_be_asked_about_is_not_full(monkeypatch):
    monkeypatch.setattr(openmp, "_ASKED", ("no_such_function",))
    openmp._ask_openmp_of_torch.cache_clear()
    try:
        assert not openmp.full_team()
    finally:
        openmp._ask_openmp_of_torch.cache_clear()


def test_torch_s_internal_products_are_only_called_after_the_team_check():
    """In `products.py`, by functions that ask `library` or `full_team`; `offers_onednn` tries them on 12 numbers."""
    asked = {"library", "full_team"}
    for path in Path(stn_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "torch.ops.mkldnn" in ast.unparse(node):
                calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                assert path.name == "products.py"
                assert node.name == "offers_onednn" or calls & asked, node.name


def test_a_run_uses_one_thread_if_openmp_would_start_fewer_than_asked_for(monkeypatch):
    from stn_fast.training import run

    before = torch.get_num_threads()
    with run.using_threads(2):
        assert torch.get_num_threads() == 2
    monkeypatch.setattr(run, "full_team", lambda: False)
    with run.using_threads(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("layer", ["conv2d", "lstm"])
def test_a_team_that_shrinks_before_the_backward_pass_of_a_folded_layer_is_an_error(layer, monkeypatch):
    """torch's own backward pass would be wrong, or would not return."""
    if layer == "conv2d":
        y = stn_fast.HyperConv2d(3, 4, 3, num_hyperparameters=2)(torch.randn(2, 3, 8, 8), torch.randn(2))
    else:
        y, _ = stn_fast.HyperLSTM(3, 4, num_hyperparameters=2)(torch.randn(5, 2, 3), torch.randn(2))
    monkeypatch.setattr(openmp, "full_team", lambda: False)
    with pytest.raises(RuntimeError, match="fewer threads than it did in the forward pass"):
        y.sum().backward()


def test_onednn_is_on_again_after_concurrent_threads_have_switched_it_off(monkeypatch):
    monkeypatch.setattr(openmp, "full_team", lambda: False)
    meet, seen = threading.Barrier(4), []

    @openmp.any_team
    def compute():
        meet.wait(timeout=60)  # all are inside
        seen.append(bool(torch.backends.mkldnn.enabled))

    for _ in range(20):
        threads = [threading.Thread(target=compute) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.backends.mkldnn.enabled
    assert seen == [False] * 80
