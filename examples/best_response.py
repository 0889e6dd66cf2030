"""The theory behind gated layers: for a shallow linear network, gating hidden units is the exact best response.

    python examples/best_response.py

The network x ↦ s·(Q x) is fitted to N examples X (N, I), t (N,) with a penalty on its Jacobian w = Qᵀs:

    ‖X w − t‖² + exp(λ) ‖w‖²,  which is least at  w*(λ) = (XᵀX + exp(λ) I)⁻¹ Xᵀt.

Self-Tuning Networks (MacKay et al., ICLR 2019, section 3.2): with Q₀ the principal components of X, of singular values
d, and s₀ the solution without a penalty, w*(λ) is what that network computes if its hidden unit k is multiplied by
σ(2 log d_k − λ). So a layer with weight 0, response weight Q₀ and these gates *is* the best response for every λ; and a
gate that is linear in λ̃ − λ, as in this package, is the best response to first order.
"""

from __future__ import annotations

import torch
from torch import Tensor

import stn_fast as stn


def regression(examples: int = 60, inputs: int = 7) -> tuple[Tensor, Tensor]:
    """X (N, I) of full rank with spread singular values, and t (N,), float64."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=draw, dtype=torch.float64) * torch.logspace(-1, 1, inputs)
    noise = torch.randn(examples, generator=draw, dtype=torch.float64)
    return x, x @ torch.randn(inputs, generator=draw, dtype=torch.float64) + noise


def exact_solution(x: Tensor, t: Tensor, log_penalty: Tensor | float) -> Tensor:
    """w*(λ), (I,)."""
    penalty = torch.as_tensor(log_penalty, dtype=x.dtype).exp() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty, x.T @ t)


def gates(x: Tensor, log_penalty: Tensor | float) -> Tensor:
    """σ(2 log d_k − λ) of each hidden unit, (I,)."""
    return torch.sigmoid(2 * torch.linalg.svdvals(x).log() - log_penalty)


def read_out(x: Tensor, t: Tensor) -> Tensor:
    """s₀, (I,)."""
    return components(x) @ exact_solution(x, t, -torch.inf)


def components(x: Tensor) -> Tensor:
    """Q₀, (I, I): a principal component in each row."""
    return torch.linalg.svd(x, full_matrices=False)[2]


def exact_layer(x: Tensor) -> stn.HyperLinear:
    """The hidden layer for every λ: its response input is the gates themselves, one for each unit."""
    units = x.shape[1]
    layer = stn.HyperLinear(units, units, bias=False, num_hyperparameters=units, dtype=x.dtype)
    with torch.no_grad():
        layer.weight.zero_()
        layer.response_weight.copy_(components(x))
        layer.weight_gate.copy_(torch.eye(units))
    return layer


def linear_layer(x: Tensor, log_penalty: float) -> stn.HyperLinear:
    """The hidden layer around one λ: its response input is λ̃ − λ, and its gates are the slopes of the sigmoids."""
    layer = stn.HyperLinear(x.shape[1], x.shape[1], bias=False, num_hyperparameters=1, dtype=x.dtype)
    gate = gates(x, log_penalty)
    with torch.no_grad():
        layer.weight.copy_(gate[:, None] * components(x))
        layer.response_weight.copy_(components(x))
        layer.weight_gate.copy_((-gate * (1 - gate))[:, None])
    return layer


def error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found - exact).norm() / exact.norm())


@torch.no_grad()
def error_of_gating(x: Tensor, t: Tensor, log_penalty: float) -> float:
    """That of the predictions of `exact_layer` against those of w*(λ)."""
    hidden = exact_layer(x)(x, gates(x, log_penalty).expand(len(x), -1))
    return error(hidden @ read_out(x, t), x @ exact_solution(x, t, log_penalty))


@torch.no_grad()
def error_of_linear_gate(x: Tensor, t: Tensor, log_penalty: float, shift: float) -> float:
    """That of the predictions of `linear_layer` against those of w*(λ + shift)."""
    hidden = linear_layer(x, log_penalty)(x, torch.full((len(x), 1), shift, dtype=x.dtype))
    return error(hidden @ read_out(x, t), x @ exact_solution(x, t, log_penalty + shift))


def main() -> None:
    x, t = regression()
    print("penalty exp(λ)   error of gating hidden units by σ(2 log d − λ)")
    for log_penalty in range(-8, 9, 4):
        print(f"{torch.tensor(float(log_penalty)).exp():14.4g}   {error_of_gating(x, t, log_penalty):.1e}")
    print("\nshift of λ from 0   error of gates linear in the shift")
    for shift in (0.4, 0.2, 0.1, 0.05):
        print(f"{shift:17}   {error_of_linear_gate(x, t, 0.0, shift):.1e}")


if __name__ == "__main__":
    main()
