"""Every layer computes on every device what it computes in float64 on the CPU, forward and backward."""

import copy

import pytest
import torch
from numerics import assert_twice_as_good

import stn_fast as stn
from stn_fast import layers
from stn_fast.dispatch import use_backend

BATCH = 6
SPACE = stn.HyperparameterSpace([stn.Hyperparameter(f"h{k}", low=0.0, high=0.9, init=0.3, scale=0.5) for k in range(3)])
N = len(SPACE)


def images():
    return torch.randn(BATCH, 4, 10, 10)


LAYERS = {
    "linear": (lambda: layers.HyperLinear(12, 20, num_hyperparameters=N), lambda: torch.randn(BATCH, 12)),
    "conv2d": (lambda: layers.HyperConv2d(4, 8, 3, num_hyperparameters=N, padding=1), images),
    "strided conv2d of groups": (
        lambda: layers.HyperConv2d(4, 8, 3, num_hyperparameters=N, stride=2, groups=2, relu=True),
        images,
    ),
    "batch norm": (lambda: layers.HyperBatchNorm2d(4, num_hyperparameters=N), images),
    "LSTM": (lambda: layers.HyperLSTM(12, 16, num_layers=2, num_hyperparameters=N), lambda: torch.randn(5, BATCH, 12)),
    "embedding": (
        lambda: layers.HyperEmbedding(30, 12, num_hyperparameters=N),
        lambda: torch.randint(30, (BATCH, 5)),
    ),
    "dropout": (lambda: layers.PerExampleDropout("h0", stream=1), images),
    "dropout of channels": (lambda: layers.PerExampleDropout2d("h1", stream=2), images),
}


def hyperparameters(device):
    """Drawn on the CPU, as normal draws differ from one device to another by rounding."""
    hyper = SPACE.sample(*SPACE.initial_state(), batch_size=BATCH, seed=0, step=3)
    return hyper.to(device)


def outcome(layer, x, device, dtype):
    """The output and the gradient of every parameter and of a floating-point input."""
    layer = copy.deepcopy(layer).to(device, dtype)
    x = x.to(device, dtype if x.is_floating_point() else None)
    x = x.detach().requires_grad_(x.is_floating_point())
    y = layer(x, hyperparameters(device))
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(device, dtype)
    wanted = [*layer.parameters(), *([x] if x.requires_grad else [])]
    gradients = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
    names = ["y", *(name for name, _ in layer.named_parameters()), "x"]
    return {name: value for name, value in zip(names, (y.detach(), *gradients), strict=False) if value is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_as_good_as_plain_torch_on_this_device(name, device):
    torch.manual_seed(0)
    make, draw = LAYERS[name]
    layer, x = make(), draw()
    for parameter_name, parameter in layer.named_parameters():
        if parameter_name.endswith("_gate"):
            torch.nn.init.normal_(parameter, std=0.5)
    got = outcome(layer, x, device, torch.float32)
    with use_backend("reference"):
        plain, exact = (outcome(layer, x, "cpu", dtype) for dtype in (torch.float32, torch.float64))
    assert got.keys() == exact.keys()
    for key, value in got.items():
        assert value.device.type == device
        assert_twice_as_good(value.cpu(), plain[key], exact[key], f"{name}: {key}")
