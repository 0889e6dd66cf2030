"""Steps of a self-tuning AlexNet as in the paper's code, in eager torch.

Each layer has two branches with materialised gates, hyperparameters are transformed one by one, gradients of all
parameters are computed even if the step does not use them, and images are augmented one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import augmentation, baselines
from benchmarks.baselines import Range

CHANNELS = (3, 64, 192, 384, 256, 256)
STRIDES = (2, 1, 1, 1, 1)
POOLED = (True, True, False, False, True)
FULLY_CONNECTED = (1024, 4096, 4096, 10)
# Makes the context of a forward pass, as for autocast.
Casting = Callable[[], AbstractContextManager[object]]

AUGMENTATIONS = (
    "brightness", "contrast", "saturation", "hue", "input_scale", "input_dropout", "cutout_length", "cutout_holes",
)  # fmt: skip


def augmented(images: Tensor, strengths: Mapping[str, Tensor]) -> Tensor:
    """uint8 images (B, 3, H, W) one by one through Pillow and NumPy, each under strengths of its own."""
    rows = torch.stack(list(strengths.values()), dim=1).cpu().numpy()
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    names, one = tuple(strengths), augmentation.augment_image_for_cifar10
    return augmentation.augment_image_by_image(arrays, rows, names, one).to(images.device)


class Gated(nn.Module):
    """The parameters of a gated layer: `inputs` numbers meet each of `outputs` outputs."""

    def __init__(self, outputs: int, inputs: tuple[int, ...], n: int):
        super().__init__()
        bound = math.prod(inputs) ** -0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.weight, self.response_weight = uniform(outputs, *inputs), uniform(outputs, *inputs)
        self.bias, self.response_bias = uniform(outputs), uniform(outputs)
        self.weight_gate, self.bias_gate = (nn.Parameter(0.01 * torch.randn(outputs, n)) for _ in range(2))


def branches(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parameters of a `Gated` layer, in the order in which the baselines take them."""
    return (
        layer.weight, layer.bias, layer.response_weight, layer.response_bias, layer.weight_gate, layer.bias_gate,
    )  # fmt: skip


class AlexNet(nn.Module):
    """3-64-192-384-256-256, then 1024-4096-4096-10."""

    def __init__(self, n: int):
        super().__init__()
        self.convolutions = nn.ModuleList(Gated(o, (i, 3, 3), n) for i, o in pairwise(CHANNELS))
        sizes = pairwise(FULLY_CONNECTED)
        self.layers = nn.ModuleList(Gated(o, (i,), n) for i, o in sizes)

    def forward(self, x: Tensor, h: Tensor, rates: Mapping[str, Tensor] | None) -> Tensor:
        """(B, 3, 32, 32) → (B, 10); `rates` (B,) by name, None in a validation step."""
        for i, (layer, stride, pooled) in enumerate(zip(self.convolutions, STRIDES, POOLED, strict=True), start=1):
            x = torch.relu(baselines.gated_conv2d(x, *branches(layer), h, stride=stride, padding=1))
            x = F.max_pool2d(x, 2) if pooled else x
            x = x if rates is None else baselines.dropout(x, rates[f"conv_dropout_{i}"], 0, (2, 3))
        x = x.flatten(1)
        for i, layer in enumerate(self.layers, start=1):
            if rates is not None and f"fc_dropout_{i}" in rates:
                x = baselines.dropout(x, rates[f"fc_dropout_{i}"], 0, ())
            x = baselines.gated_linear(x, *branches(layer), h)
            x = torch.relu(x) if i < len(self.layers) else x
        return x


class Trainer:
    """The published pair of steps on `AlexNet`.

    Args:
        names, ranges: the hyperparameters, in the order of their columns.
        location, raw_scale: (n,), where they start.
    """

    def __init__(
        self,
        names: Sequence[str],
        ranges: Sequence[Range],
        location: Tensor,
        raw_scale: Tensor,
    ):
        self.names, self.ranges, self.center = tuple(names), tuple(ranges), location.clone()
        self.location, self.raw_scale = (t.clone().requires_grad_() for t in (location, raw_scale))
        self.model = AlexNet(len(self.names)).to(location.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.hyper_optimizer = torch.optim.Adam([self.location, self.raw_scale], lr=3e-3)

    def _perturbed(self, batch: int) -> tuple[dict[str, Tensor], Tensor]:
        values, response = baselines.perturb(self.location, self.raw_scale, self.center, self.ranges, batch)
        return dict(zip(self.names, values.detach().unbind(1), strict=True)), response

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        for tensor in (*self.model.parameters(), self.location, self.raw_scale):
            tensor.grad = None
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train_step(self, images: Tensor, targets: Tensor, casting: Casting = nullcontext) -> Tensor:
        """On floats as they are, on uint8 images augmented first."""
        values, response = self._perturbed(len(images))
        if images.dtype == torch.uint8:
            images = augmented(images, {name: values[name] for name in AUGMENTATIONS})
        with casting():
            loss = F.cross_entropy(self.model(images, response, values), targets)
        return self._descend(loss, self.optimizer)

    def valid_step(self, images: Tensor, targets: Tensor, casting: Casting = nullcontext) -> Tensor:
        """On floats; without regularisation."""
        _, response = self._perturbed(len(images))
        with casting():
            loss = F.cross_entropy(self.model(images, response, None), targets)
        entropy = F.softplus(self.raw_scale).log().sum()
        return self._descend(loss - 1e-3 * entropy, self.hyper_optimizer)
