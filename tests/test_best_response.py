"""The theory behind the layers: for a shallow linear network the exact best response is a gating of hidden units."""

import torch
from numerics import relative_error

import stn_fast as stn


def ridge_problem(examples=60, inputs=7):
    """Regression data of full rank with spread singular values, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, inputs)
    t = x @ torch.randn(inputs, generator=generator, dtype=torch.float64) + torch.randn(examples, generator=generator)
    return x, t.double()


def exact_solution(x, t, log_penalty):
    """Minimiser w of ‖x w − t‖² + exp(λ) ‖w‖²: w is the Jacobian of the network with respect to its input."""
    penalty = torch.exp(log_penalty) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + penalty, x.T @ t)


def test_gated_hidden_units_are_the_exact_best_response_for_every_penalty():
    """STN, section 3.2: y = s₀ᵀ (σ(λ v + c) ⊙ Q₀ x), with Q₀ the principal components of the data.

    The layer's gates see h = σ(c − λ), one an output unit; its response weight is Q₀ and its weight 0.
    """
    x, t = ridge_problem()
    _, singular, components = torch.linalg.svd(x, full_matrices=False)
    readout = components @ exact_solution(x, t, torch.tensor(-torch.inf, dtype=torch.float64))
    units = len(singular)
    layer = stn.HyperLinear(units, units, bias=False, num_hyperparameters=units, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.response_weight.copy_(components)
        layer.weight_gate.copy_(torch.eye(units))
    log_penalties = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for log_penalty in log_penalties:
        gates = torch.sigmoid(2 * singular.log() - log_penalty)
        prediction = layer(x, gates.expand(len(x), -1)) @ readout
        assert relative_error(prediction, x @ exact_solution(x, t, log_penalty)) < 1e-11


def test_a_linear_gate_is_the_best_response_to_first_order():
    """h = λ̃ − λ₀ with the sigmoid's slope as gate: the error is of second order in the perturbation."""
    x, t = ridge_problem()
    _, singular, components = torch.linalg.svd(x, full_matrices=False)
    readout = components @ exact_solution(x, t, torch.tensor(-torch.inf, dtype=torch.float64))
    layer = stn.HyperLinear(len(singular), len(singular), bias=False, num_hyperparameters=1, dtype=torch.float64)
    gates = torch.sigmoid(2 * singular.log())
    with torch.no_grad():
        layer.weight.copy_(gates[:, None] * components)
        layer.response_weight.copy_(components)
        layer.weight_gate.copy_((-gates * (1 - gates))[:, None])
    errors = []
    for shift in (0.1, 0.05):
        h = torch.full((len(x), 1), shift, dtype=torch.float64)
        exact = x @ exact_solution(x, t, torch.tensor(shift, dtype=torch.float64))
        errors.append(relative_error(layer(x, h) @ readout, exact))
    assert 3.8 < errors[0] / errors[1] < 4.2
