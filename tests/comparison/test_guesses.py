"""Guesses: where each one is in a range, and the errors for those that cannot be."""

import math
from dataclasses import replace

import pytest

from stn_fast.comparison.guesses import guessed, read_guesses
from stn_fast.errors import UserError
from stn_fast.recipes import RECIPES, recipe
from stn_fast.training.config import HyperparameterConfig

DIGITS = recipe("digits").config()


@pytest.mark.parametrize(
    ("guess", "dropout", "noise", "decay"),
    [("low", 0.045, 0.03, 1e-4), ("middle", 0.27, 0.3, 1e-3), ("high", 0.585, 3.0, 1e-2), ("recipe", 0.3, 0.3, 1e-3)],
)
def test_a_name_sets_every_hyperparameter(guess, dropout, noise, decay):
    starts = {name: entry.init for name, entry in guessed(DIGITS, guess).hyperparameters.items()}
    dropouts = dict.fromkeys(("input_dropout", "hidden_dropout_1", "hidden_dropout_2"), dropout)
    assert starts == pytest.approx({**dropouts, "input_noise": noise, "weight_decay": decay})


def test_a_number_sets_the_dropout_rates_only():
    starts = {name: entry.init for name, entry in guessed(DIGITS, 0.6).hyperparameters.items()}
    assert starts.pop("input_noise") == 0.3
    assert starts.pop("weight_decay") == 1e-3
    assert set(starts.values()) == {0.6}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("guess", ["low", "middle", "high"])
def test_every_recipe_has_every_guess_inside_its_ranges(name, guess):
    defaults = recipe(name).config()
    for key, entry in guessed(defaults, guess).enabled.items():
        named = entry.named(key)  # raises outside of the range, and beside its bounds in float32
        if entry.integer:
            assert entry.low <= math.floor(named.init) < entry.high
    assert {k: v for k, v in guessed(defaults, guess).hyperparameters.items() if not v.enabled} == {
        k: v for k, v in defaults.hyperparameters.items() if not v.enabled
    }


def test_a_guess_from_a_single_bound_is_measured_from_it():
    entries = {"a": HyperparameterConfig(init=3.0, low=2.0), "b": HyperparameterConfig(init=-1.0, high=1.0)}
    starts = guessed(replace(DIGITS, hyperparameters=entries), "low").hyperparameters
    assert starts["a"].init == pytest.approx(2.1)
    assert starts["b"].init == pytest.approx(0.8)
    with pytest.raises(UserError, match="a bound of c"):
        guessed(replace(DIGITS, hyperparameters={"c": HyperparameterConfig(init=0.0)}), "low")


def test_a_list_of_guesses_is_read_once_each():
    assert read_guesses("low, .05,recipe,low,0.05") == ["low", 0.05, "recipe"]


@pytest.mark.parametrize(("text", "says"), [("lo", "did you mean 'low'"), ("low,,high", "''"), ("nine", "'nine'")])
def test_an_unknown_guess_is_named(text, says):
    with pytest.raises(UserError, match=says):
        read_guesses(text)


def test_a_rate_outside_of_its_bounds_is_named():
    with pytest.raises(UserError, match=r"init = 0\.95"):
        guessed(DIGITS, 0.95)
