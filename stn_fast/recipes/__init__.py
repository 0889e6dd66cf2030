"""Recipes by name: each module has ``config()``, its defaults, and ``build(config)``, its task."""

from importlib import import_module
from types import ModuleType

from stn_fast.errors import UserError, did_you_mean

RECIPES = {
    "digits": "stn_fast.recipes.digits",
    "fashion-mnist-small": "stn_fast.recipes.fashion_mnist_small",
    "fashion-mnist": "stn_fast.recipes.fashion_mnist",
    "cifar10": "stn_fast.recipes.cifar10",
    "ptb-small": "stn_fast.recipes.ptb_small",
    "ptb": "stn_fast.recipes.ptb",
    "wikitext2": "stn_fast.recipes.wikitext2",
    "text": "stn_fast.recipes.text",
}


def recipe(name: str) -> ModuleType:
    """The module of the recipe ``name``; importing it imports nothing heavy.

    Raises:
        UserError: there is no such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}': {did_you_mean(name, RECIPES)}")
    return import_module(RECIPES[name])
