"""Steps of the response that stay stable where hyperparameters are perturbed widely, or are far from their start."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stn_fast.layers.embedding import GatedTable
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.distributed import Processes
from stn_fast.training.sharding import full, local, replicated_like


class ResponseSteps:
    """Keeps steps of the responses R and r of gated layers as stable as those of W and b.

    An output is W x + s (R x) with s = Gw h, so the curvature of the loss in a row of R is E[s²] times that in this row
    of W: where h is large, R diverges with learning rates at which W does not. The gradient of each row of R is
    therefore divided by max(1, E[s²]), the mean over the examples of the step, and that of r likewise. Optimizers that
    divide by the size of gradients, such as Adam, hardly notice.
    """

    def __init__(self, model: nn.Module):
        self._parts: list[tuple[Tensor, Tensor, bool]] = []  # R or r, its gate, and whether outputs are columns of R
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            for name, response in own.items():
                gate = name.replace("response_weight", "weight_gate").replace("response_bias", "bias_gate")
                if gate != name and gate in own:
                    columns = isinstance(module, GatedTable) and module.response_projection is None
                    self._parts.append((response, own[gate], columns))

    @torch.no_grad()
    def shorten(
        self, trained: Sequence[Tensor], responses: Sequence[Tensor], processes: Processes | None = None
    ) -> None:
        """Divides the gradients in place.

        Args:
            trained: the parameters that have a gradient.
            responses: h (B, n) of each pass of the step.
            processes: those that share the batch, of whose examples `responses` has a part.
        """
        having_gradients = set(map(id, trained))
        parts = [part for part in self._parts if id(part[0]) in having_gradients]
        if not parts:
            return
        moments = torch.stack([h.T @ h / len(h) for h in responses]).mean(0)
        if processes is not None:
            (moments,) = processes.averages([moments], sum(map(len, responses)))
            moments = moments.to(responses[0].dtype)
        pairs = [_gradient_and_gate(*part) for part in parts]
        gates = torch.cat([gate.to(moments) for _, gate in pairs])  # one product for all layers
        squares = ((gates @ moments) * gates).sum(1).clamp(min=1)
        founds = squares.split([len(gate) for _, gate in pairs])
        for (_, _, columns), (gradient, _), found in zip(parts, pairs, founds, strict=True):
            if not columns:  # the scale of a norm may have several dimensions, with a row of the gate for each entry
                several = found.numel() == gradient.numel()
                found = found.view(gradient.shape if several else (-1, *[1] * (gradient.ndim - 1)))
            gradient.div_(replicated_like(gradient, found) if is_sharded(gradient) else found)


def _gradient_and_gate(response: Tensor, gate: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """The gradient of R or r, and its gate; of sharded ones, this process's rows of both where these are the same."""
    gradient = response.grad
    assert gradient is not None
    if is_sharded(response):
        by_row = not columns and len(response) == len(gate)
        return (local(gradient), local(gate)) if by_row else (gradient, full(gate))
    return gradient._values() if gradient.is_sparse else gradient, gate  # sparse: rows of a table
