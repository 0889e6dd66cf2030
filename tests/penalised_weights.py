"""Operands of the weight decay penalty, and the penalty by its definition."""

import torch


def operands(shape=(6, 5), batch=4, n=3):
    torch.manual_seed(0)
    drawn = torch.randn(*shape), torch.randn(*shape), torch.randn(shape[0], n), torch.randn(batch, n), torch.rand(batch)
    return [t.double().requires_grad_() for t in drawn]


def one_example_at_a_time(weight, response_weight, weight_gate, h, decay):
    """½ · mean of decay · ‖W_eff‖², every example's weights built in full."""
    gates = (h @ weight_gate.T).view(len(h), -1, *[1] * (weight.ndim - 1))
    effective = weight + gates * response_weight
    return 0.5 * (decay * effective.flatten(1).square().sum(1)).mean()
