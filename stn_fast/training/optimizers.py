"""Default optimizers of methods, optimizers named by a configuration, and changes to them for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from stn_fast.training.config import HyperOptimizerConfig, OptimizerConfig

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

# A fused optimizer makes one pass over parameters, gradients and state.
default_optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True)
default_hyper_optimizer = partial(torch.optim.Adam, lr=1e-2, betas=(0.9, 0.9), fused=True)


def weight_optimizer(config: OptimizerConfig) -> MakeOptimizer:
    """A function that makes the optimizer of the weights, as ``config`` describes."""
    if config.name == "adam":
        return partial(torch.optim.Adam, lr=config.learning_rate, betas=(config.momentum, 0.999), fused=True)
    return partial(torch.optim.SGD, lr=config.learning_rate, momentum=config.momentum, fused=True)


def hyper_optimizer(config: HyperOptimizerConfig) -> MakeOptimizer:
    """A function that makes the optimizer of locations and scales, as ``config`` describes."""
    if config.name == "rmsprop":
        return partial(torch.optim.RMSprop, lr=config.learning_rate, alpha=config.beta2)
    return partial(torch.optim.Adam, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def captures(device: torch.device) -> bool:
    """Whether steps on ``device`` can be captured, which requires that optimizers keep all state on it."""
    return device.type == "cuda"


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Makes ``optimizer`` keep its step counts, and the learning rate of a fused one, in tensors on a CUDA device.

    A CUDA graph repeats the host's work at capture, so it would not see a number that changes on the host. Optimizers
    that can't be captured, and those on other devices, don't change. Call this again after ``load_state_dict``: a state
    saved on CUDA is marked as capturable, which is wrong on the CPU.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if "capturable" in group and (captures(device) or device.type == "cpu"):
            group["capturable"] = captures(device)
        if not captures(device):
            continue
        if group.get("fused"):  # others would read a tensor back; their graphs are captured again for a new rate
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """That of the first parameters; of a float32 tensor the shortest decimal, 0.05 rather than 0.05000000074505806."""
    rate = optimizer.param_groups[0]["lr"]
    return float(str(np.float32(rate.item()))) if isinstance(rate, Tensor) else rate


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets it for all parameters; a tensor is written to, as a captured step reads that one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
