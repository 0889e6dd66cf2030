"""Weight decay of a layer whose weights differ from example to example, in closed form."""

import torch
from torch import Tensor

from stn_fast.ops._uncast import product


def weight_decay_penalty(
    weight: Tensor, response_weight: Tensor, weight_gate: Tensor, h: Tensor, decay: Tensor
) -> Tensor:
    """½ · mean over examples of decay[b] · ‖W + diag(Gw h[b]) R‖², without building any example's weights.

    With a_o = ‖W_o‖², c_o = ⟨W_o, R_o⟩, q_o = ‖R_o‖² and s = h Gwᵀ, example b has ‖W_eff‖² = Σ_o a_o + 2 s_bo c_o +
    s_bo² q_o; the examples enter only through the moments Σ_b decay[b], Σ_b decay[b] h[b] and
    Σ_b decay[b] h[b] h[b]ᵀ, so the cost does not grow with B·O.

    Args:
        weight, response_weight: (O, ...), flattened behind the first dimension.
        weight_gate: (O, n).
        h: (B, n), or (n,) shared by all examples.
        decay: (B,), in torch's convention: the gradient of the penalty to W is decay · W.

    Returns:
        Scalar, float32 (float64 for a float64 weight), differentiable to every argument; under autocast too.

    Raises:
        ValueError: the shapes do not fit together, or the batch is empty.
    """
    outputs, n = weight_gate.shape
    h = h.expand(decay.shape[0], n) if h.ndim == 1 else h
    if weight.shape != response_weight.shape or weight.shape[0] != outputs or h.shape != (decay.shape[0], n):
        raise ValueError(
            "weight_decay_penalty wants weight and response_weight (O, ...), weight_gate (O, n), h (B, n) and "
            f"decay (B,); got {tuple(weight.shape)}, {tuple(response_weight.shape)}, {tuple(weight_gate.shape)}, "
            f"{tuple(h.shape)}, {tuple(decay.shape)}"
        )
    batch = decay.shape[0]
    if batch == 0:
        raise ValueError("weight_decay_penalty wants at least one example; got an empty batch")
    # Sums of many squares and of few examples: 16-bit tensors are widened.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, response_weight = weight.flatten(1).to(dtype), response_weight.flatten(1).to(dtype)
    weight_gate, h, decay = weight_gate.to(dtype), h.to(dtype), decay.to(dtype)
    weighted = decay[:, None] * h
    mean_gate = (weight_gate * weighted.sum(0)).sum(1) / batch
    mean_square_gate = (product(weight_gate, product(h.T, weighted)) * weight_gate).sum(1) / batch
    per_output = (
        decay.mean() * weight.square().sum(1)
        + 2 * mean_gate * (weight * response_weight).sum(1)
        + mean_square_gate * response_weight.square().sum(1)
    )
    return 0.5 * torch.sum(per_output)
