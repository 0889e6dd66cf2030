"""The moving average of the weights that evaluations may use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from stn_fast.errors import UserError


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` whose parameters become, by ``update_parameters``, the exponential moving average of its own.

    The t-th update keeps min(decay, (1 + t) / (10 + t)) of the average, so that the first weights are soon forgotten.

    Raises:
        UserError: the model has running statistics, which would be those of its own weights, not of their average.
    """
    statistics = [name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if statistics:
        raise UserError(
            f"optimizer.average = {decay}: must be 0 for a network with batch norm, as {statistics[0]} is that of the "
            "weights themselves"
        )

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        t = int(count)  # on the CPU, whatever the device of the model
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + t) / (10 + t)))

    return AveragedModel(model, multi_avg_fn=update)
