"""The theory behind the layers, as examples/best_response.py shows it."""

import best_response
import pytest


@pytest.fixture(scope="module")
def data():
    return best_response.regression()


@pytest.mark.parametrize("log_penalty", range(-8, 9, 2))
def test_gated_hidden_units_are_the_exact_best_response_for_every_penalty(data, log_penalty):
    assert best_response.error_of_gating(*data, log_penalty) < 1e-11


def test_a_linear_gate_is_the_best_response_to_first_order(data):
    errors = [best_response.error_of_linear_gate(*data, 0.0, shift) for shift in (0.1, 0.05)]
    assert 3.8 < errors[0] / errors[1] < 4.2
    assert errors[1] < 1e-3


def test_other_gates_are_not(data, monkeypatch):
    gates = best_response.gates
    monkeypatch.setattr(best_response, "gates", lambda x, log_penalty: gates(x, log_penalty + 0.1))
    assert best_response.error_of_gating(*data, 0) > 1e-4


def test_the_example_prints_both_tables(capsys):
    best_response.main()
    assert capsys.readouterr().out.count("e-") == 9
