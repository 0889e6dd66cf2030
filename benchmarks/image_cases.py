"""The measured cases on images: gated convolutions and augmentation, and their providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import augmentation, baselines
from benchmarks.gradients import compiled, differentiate
from benchmarks.timing import Provider

if TYPE_CHECKING:
    from benchmarks.cases import Case

HYPERPARAMETERS = 15

# (B, C, H, W, O, kernel, stride), padded by half of the kernel: every layer of the CIFAR networks that differs.
GATED_CONV2D_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "alexnet": (
        (128, 3, 32, 32, 64, 3, 2),
        (128, 64, 8, 8, 192, 3, 1),
        (128, 192, 4, 4, 384, 3, 1),
        (128, 384, 4, 4, 256, 3, 1),
        (128, 256, 4, 4, 256, 3, 1),
    ),
    "resnet18": (
        (128, 3, 32, 32, 64, 3, 1),
        (128, 64, 32, 32, 64, 3, 1),
        (128, 64, 32, 32, 128, 3, 2),
        (128, 64, 32, 32, 128, 1, 2),
        (128, 128, 16, 16, 128, 3, 1),
        (128, 128, 16, 16, 256, 3, 2),
        (128, 128, 16, 16, 256, 1, 2),
        (128, 256, 8, 8, 256, 3, 1),
        (128, 256, 8, 8, 512, 3, 2),
        (128, 256, 8, 8, 512, 1, 2),
        (128, 512, 4, 4, 512, 3, 1),
    ),
}
# mode: which of x, W, b, R, r, Gw, Gb, h have their gradient timed, after the forward. Images have none.
GATED_CONV2D_MODES: dict[str, tuple[bool, ...]] = {
    "train": (True,) * 7 + (False,),
    "valid": (True,) + (False,) * 6 + (True,),
}
IMAGE_CHANNELS = 3

# (B, C, H, W): a batch of CIFAR-10, and photographs
AUGMENT_SHAPES = ((128, 3, 32, 32), (16, 3, 224, 224))
# On CUDA also one whose images exceed an L2 cache of 50 MB: 25 MB of bytes become 101 MB of float32.
LARGE_AUGMENT_SHAPES = ((8192, 3, 32, 32),)
# Strengths are drawn from 0 to these.
AUGMENT_STRENGTHS = {
    "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.3, "input_scale": 0.3, "input_noise": 0.2,
    "rotation": 20.0, "translation": 0.1, "scale": 0.2, "shear": 10.0, "cutout_length": 16.99, "cutout_holes": 4.99,
    "input_dropout": 0.3,
}  # fmt: skip


def gated_conv2d(case: Case) -> dict[str, Provider]:
    """The package, two branches in eager torch, one convolution and a compiled epilogue, and the bare convolutions.

    Images are contiguous on the CPU and channels_last on CUDA, where that is cuDNN's fastest layout; the bare
    convolutions are timed in both.
    """
    from stn_fast.functional import gated_conv2d as fused

    batch, channels, height, width, outputs, kernel, stride = case.shape
    padding, n = kernel // 2, HYPERPARAMETERS

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, device=case.device).mul_(scale).to(case.dtype)

    bound = (channels * kernel**2) ** -0.5
    layout, other = layouts(case.device)
    x, h = normal(batch, channels, height, width).contiguous(memory_format=layout), normal(batch, n)
    weight, response_weight = (normal(outputs, channels, kernel, kernel, scale=bound) for _ in range(2))
    bias, response_bias = (normal(outputs, scale=bound) for _ in range(2))
    weight_gate, bias_gate = (normal(outputs, n, scale=0.1) for _ in range(2))
    inputs = (x, weight, bias, response_weight, response_bias, weight_gate, bias_gate, h)
    wanted = (GATED_CONV2D_MODES[case.mode][0] and channels != IMAGE_CHANNELS, *GATED_CONV2D_MODES[case.mode][1:])
    dy = torch.randn_like(F.conv2d(x, weight, None, stride, padding)).contiguous(memory_format=layout)
    geometry: dict[str, Any] = dict(stride=stride, padding=padding)

    def concatenated(x: Tensor, w: Tensor, b: Tensor, rw: Tensor, rb: Tensor, *gates: Tensor) -> Tensor:
        y: Tensor = epilogue(F.conv2d(x, torch.cat([w, rw]), None, stride, padding), b, rb, *gates)
        return y

    functions: dict[str, Callable[..., Tensor]] = {
        "stn_fast": lambda *leaves: fused(*leaves, **geometry),
        "eager": lambda *leaves: baselines.gated_conv2d(*leaves, **geometry),
    }
    if case.compiled:
        epilogue = compiled(baselines.gated_channels)
        functions["compiled"] = compiled(functions["eager"])
        functions["concatenated"] = concatenated
    providers = {name: differentiate(function, inputs, wanted, dy) for name, function in functions.items()}
    both_weights = torch.cat([weight, response_weight])
    both_dy = torch.cat([dy, dy * (h @ weight_gate.T)[:, :, None, None]], dim=1)
    mask = [wanted[0], wanted[1], False]

    def bare(layout: torch.memory_format) -> Provider:
        images, filters, incoming = (t.contiguous(memory_format=layout) for t in (x.detach(), both_weights, both_dy))

        def convolutions(_: None) -> object:
            products = F.conv2d(images, filters, None, stride, padding)
            return products, torch.ops.aten.convolution_backward(
                incoming, images, filters, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
            )

        return Provider(convolutions)

    return providers | {
        "limit_one_convolution": bare(layout),
        f"{'channels_last' if other == torch.channels_last else 'contiguous'}_convolution": bare(other),
    }


def layouts(device: torch.device) -> tuple[torch.memory_format, torch.memory_format]:
    """That of a convolution's images on this device, and the other one."""
    if device.type == "cuda":
        return torch.channels_last, torch.contiguous_format
    return torch.contiguous_format, torch.channels_last


def augment_shapes(device: torch.device) -> tuple[tuple[int, ...], ...]:
    return AUGMENT_SHAPES + (LARGE_AUGMENT_SHAPES if device.type == "cuda" else ())


def augment_inputs(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and all strengths."""
    images = torch.randint(0, 256, case.shape, dtype=torch.uint8, device=case.device)
    return images, {
        name: torch.rand(len(images), device=case.device) * most for name, most in AUGMENT_STRENGTHS.items()
    }


def augment(case: Case) -> dict[str, Provider]:
    """The package, batched eager torch, and on the CPU Pillow and NumPy image by image."""
    from stn_fast.functional import augment as fused

    images, strengths = augment_inputs(case)
    step = torch.zeros((), dtype=torch.int64, device=case.device)
    options: dict[str, Any] = dict(
        mean=augmentation.MEAN, std=augmentation.STD, flip=augmentation.FLIP, crop_padding=augmentation.CROP_PADDING
    )

    def ours(_: None) -> object:
        return fused(images, strengths, seed=0, step=step, stream=1, **options)

    def eager(_: None) -> object:
        return augmentation.augment(images, strengths, augmentation.draw(images))

    providers = {"stn_fast": Provider(ours), "eager": Provider(eager)}
    if case.device.type == "cuda":
        return providers  # events on a stream do not time Pillow
    # What a data loader holds: arrays with the channels last.
    arrays, rows = images.permute(0, 2, 3, 1).numpy().copy(), torch.stack([*strengths.values()], 1).numpy()

    def by_image(_: None) -> object:
        return augmentation.augment_image_by_image(arrays, rows, tuple(strengths))

    return providers | {"pillow": Provider(by_image)}
